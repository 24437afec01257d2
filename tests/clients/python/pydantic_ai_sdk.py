"""pydantic-ai with its models for chat completions, responses and messages."""

import asyncio

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from tries import ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, ROOT, run, same, seeded

calls: list[tuple[int, int]] = []


class Answer(BaseModel):
    answer: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    calls.append((a, b))
    return a + b


def openai() -> OpenAIProvider:
    return OpenAIProvider(openai_client=AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0))


def anthropic() -> AnthropicProvider:
    return AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=ROOT, api_key=KEY, max_retries=0))


def tries(model: object, *, native: bool) -> dict:
    # Each run has an event loop of its own, so each has a client of its own, too.
    def agent(**more: object) -> Agent:
        made: Model = model()
        return Agent(made, instructions="Answer briefly.", retries=0, **more)

    def plain() -> None:
        same(agent().run_sync(QUESTION).output, ANSWER)

    def stream() -> None:
        async def streamed() -> str:
            async with agent().run_stream(QUESTION) as result:
                return "".join([piece async for piece in result.stream_text(delta=True)])

        same(asyncio.run(streamed()), ANSWER)

    def tools() -> None:
        calls.clear()
        same(agent(tools=[add]).run_sync(QUESTION).output, ANSWER)
        same(calls, [(2, 2)])

    def structured() -> None:
        same(agent(output_type=Answer).run_sync(QUESTION).output, Answer(answer=4))
        if native:  # elsewhere it takes only models that it knows for able to
            same(agent(output_type=NativeOutput(Answer)).run_sync(QUESTION).output, Answer(answer=4))

    def seed() -> None:
        def ask(number: int) -> str:
            settings = {"max_tokens": 24, "temperature": 1.0, "extra_body": {"seed": number}}
            return agent().run_sync(QUESTION, model_settings=settings).output

        seeded(ask)

    return {
        "plain": plain,
        "stream": stream,
        "tools": (tools, ADD),
        "structured": structured,
        "seed": (seed, DRAWN),
    }


run("chat/completions", tries(lambda: OpenAIChatModel(MODEL, provider=openai()), native=True))
run("responses", tries(lambda: OpenAIResponsesModel(MODEL, provider=openai()), native=True))
run("messages", tries(lambda: AnthropicModel(MODEL, provider=anthropic()), native=False))

"""OpenAI Agents SDK for Python, over both endpoints that it speaks."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel
from tries import ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, run, same, seeded

set_tracing_disabled(True)
calls: list[tuple[int, int]] = []


class Answer(BaseModel):
    answer: int


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    calls.append((a, b))
    return a + b


def tries(kind: type) -> dict:
    # Each run has an event loop of its own, so each has a client of its own, too.
    def agent(**more: object) -> Agent:
        model = kind(model=MODEL, openai_client=AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0))
        return Agent(name="assistant", instructions="Answer briefly.", model=model, **more)

    def plain() -> None:
        same(Runner.run_sync(agent(), QUESTION).final_output, ANSWER)

    def stream() -> None:
        async def streamed() -> str:
            result = Runner.run_streamed(agent(), QUESTION)
            deltas = [
                event.data.delta
                async for event in result.stream_events()
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
            ]
            same(result.final_output, ANSWER)
            return "".join(deltas)

        same(asyncio.run(streamed()), ANSWER)

    def tools() -> None:
        calls.clear()
        same(Runner.run_sync(agent(tools=[add]), QUESTION).final_output, ANSWER)
        same(calls, [(2, 2)])

    def structured() -> None:
        same(Runner.run_sync(agent(output_type=Answer), QUESTION).final_output, Answer(answer=4))

    def seed() -> None:
        def ask(number: int) -> str:
            settings = ModelSettings(max_tokens=24, temperature=1.0, extra_body={"seed": number})
            return Runner.run_sync(agent(model_settings=settings), QUESTION).final_output

        seeded(ask)

    return {
        "plain": plain,
        "stream": stream,
        "tools": (tools, ADD),
        "structured": structured,
        "seed": (seed, DRAWN),
    }


run("responses", tries(OpenAIResponsesModel))
run("chat/completions", tries(OpenAIChatCompletionsModel))

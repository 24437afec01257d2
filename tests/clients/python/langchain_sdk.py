"""LangChain's ChatOpenAI over both endpoints that it speaks; its agents run on LangGraph."""

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from tries import ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, run, same, seeded

calls: list[tuple[int, int]] = []


class Answer(BaseModel):
    """The answer to a sum."""

    answer: int


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    calls.append((a, b))
    return a + b


def tries(**kind: object) -> dict:
    def model(**more: object) -> ChatOpenAI:
        return ChatOpenAI(model=MODEL, base_url=BASE, api_key=KEY, max_retries=0, timeout=60, **kind, **more)

    def plain() -> None:
        same(model().invoke(QUESTION).text, ANSWER)

    def stream() -> None:
        same("".join(piece.text for piece in model(stream_usage=True).stream(QUESTION)), ANSWER)

    def tools() -> None:
        calls.clear()
        agent = create_agent(model(), tools=[add])
        state = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})
        same((calls, state["messages"][-1].text), ([(2, 2)], ANSWER))

    def structured() -> None:
        same(model().with_structured_output(Answer).invoke(QUESTION), Answer(answer=4))
        same(model().with_structured_output(Answer, method="function_calling").invoke(QUESTION), Answer(answer=4))

    def seed() -> None:
        def ask(number: int) -> str:
            return model(max_tokens=24, temperature=1, extra_body={"seed": number}).invoke(QUESTION).text

        seeded(ask)

    return {
        "plain": plain,
        "stream": stream,
        "tools": (tools, ADD),
        "structured": structured,
        "seed": (seed, DRAWN),
    }


run("chat/completions", tries())
run("responses", tries(use_responses_api=True, store=False))

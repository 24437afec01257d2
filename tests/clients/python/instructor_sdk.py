"""instructor in those of its modes that a server of one's own is asked for."""

from typing import Annotated, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field
from tries import BASE, FREE, KEY, MODEL, QUESTION, run, same, seeded

MESSAGES = [{"role": "user", "content": QUESTION}]
JSON = '{"answer": 4}'


class Answer(BaseModel):
    """The answer to a sum."""

    answer: int


class Coins(BaseModel):
    """What the model draws: a form that ends soon."""

    sides: Annotated[list[Literal["heads", "tails"]], Field(min_length=24, max_length=24)]


def client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=60), mode=mode)


def ask(mode: instructor.Mode, **more: object) -> Answer:
    return client(mode).create(model=MODEL, messages=MESSAGES, response_model=Answer, max_retries=0, **more)


def tools() -> None:
    same(ask(instructor.Mode.TOOLS).answer, 4)


def strict_tools() -> None:
    same(ask(instructor.Mode.TOOLS_STRICT).answer, 4)


def parallel_tools() -> None:
    found = client(instructor.Mode.TOOLS).create_iterable(model=MODEL, messages=MESSAGES, response_model=Answer)
    same(len(list(found)) > 0, True)


def structured() -> None:
    same(ask(instructor.Mode.JSON_SCHEMA).answer, 4)


def json_object() -> None:
    same(ask(instructor.Mode.JSON).answer, 4)


def markdown_json() -> None:
    same(ask(instructor.Mode.MD_JSON).answer, 4)


def stream() -> None:
    *_, last = client(instructor.Mode.JSON_SCHEMA).create_partial(
        model=MODEL, messages=MESSAGES, response_model=Answer, max_retries=0
    )
    same(last.answer, 4)


def seed() -> None:
    def one(number: int) -> str:
        _, raw = client(instructor.Mode.JSON_SCHEMA).create_with_completion(
            model=MODEL,
            messages=MESSAGES,
            response_model=Coins,
            max_retries=0,
            seed=number,
            temperature=1,
            max_tokens=512,
            extra_body={"thinking_budget": 1},  # a model that speaks noise would never end its thoughts
        )
        return raw.choices[0].message.content

    seeded(one)


run(
    "chat/completions",
    {
        "plain": (markdown_json, {"text": f"```json\n{JSON}\n```"}),
        "stream": stream,
        "tools": tools,
        "strict tools": strict_tools,
        "structured": structured,
        "json_object": (json_object, {"text": JSON}),
        "seed": (seed, FREE),
    },
)

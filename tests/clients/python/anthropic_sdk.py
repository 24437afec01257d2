"""Anthropic's SDK for Python."""

import anthropic
from pydantic import BaseModel
from tries import ADD, ANSWER, DRAWN, KEY, MODEL, QUESTION, ROOT, run, same, seeded

client = anthropic.Anthropic(base_url=ROOT, api_key=KEY, max_retries=0, timeout=60)
ASKED = {"model": MODEL, "max_tokens": 1024, "messages": [{"role": "user", "content": QUESTION}]}
TOOL = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}


class Answer(BaseModel):
    answer: int


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def plain() -> None:
    message = client.messages.create(**ASKED, system="Answer briefly.", stop_sequences=["\n\n\n"])
    same(text_of(message), ANSWER)
    same(message.stop_reason, "end_turn")


def stream() -> None:
    with client.messages.stream(**ASKED) as events:
        same("".join(events.text_stream), ANSWER)
        same(events.get_final_message().stop_reason, "end_turn")


def tools() -> None:
    asked = {**ASKED, "tools": [TOOL], "tool_choice": {"type": "auto"}}
    message = client.messages.create(**asked)
    same(message.stop_reason, "tool_use")
    [call] = [block for block in message.content if block.type == "tool_use"]
    same((call.name, call.input), ("add", {"a": 2, "b": 2}))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "4"}
    turns = [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    with client.messages.stream(**{**asked, "messages": ASKED["messages"] + turns}) as events:
        same(text_of(events.get_final_message()), ANSWER)


def structured() -> None:
    same(client.messages.parse(**ASKED, output_format=Answer).parsed_output, Answer(answer=4))


def seed() -> None:
    def ask(number: int) -> str:
        return text_of(client.messages.create(**{**ASKED, "max_tokens": 24}, extra_body={"seed": number}))

    seeded(ask)


def thinking() -> None:
    message = client.messages.create(**ASKED, thinking={"type": "enabled", "budget_tokens": 1023})
    same([block.type for block in message.content], ["thinking", "text"])
    turn = {"role": "assistant", "content": message.content}
    again = [*ASKED["messages"], turn, {"role": "user", "content": "And 3 + 1?"}]
    same(text_of(client.messages.create(**{**ASKED, "messages": again})), ANSWER)


def count() -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=ASKED["messages"], tools=[TOOL])
    if counted.input_tokens < 5:
        raise AssertionError(f"{counted.input_tokens} tokens")


run(
    "messages",
    {
        "plain": plain,
        "stream": stream,
        "tools": (tools, ADD),
        "structured": structured,
        "seed": (seed, DRAWN),
        "thinking": (thinking, {"thoughts": "Two and two."}),
        "count_tokens": count,
    },
)

"""OpenAI's SDK for Python: chat completions, completions and responses."""

import json

from openai import OpenAI
from pydantic import BaseModel
from tries import ADD, ANSWER, BASE, DRAWN, FREE, KEY, MODEL, QUESTION, run, same, seeded

client = OpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=60)
MESSAGES = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": QUESTION}]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FUNCTION = {"name": "add", "description": "Add two numbers.", "parameters": PARAMETERS, "strict": True}


class Answer(BaseModel):
    answer: int


def chat(**more: object) -> object:
    return client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **more})


def chat_plain() -> None:
    same(chat(max_completion_tokens=100, stop=["\n\n\n"]).choices[0].message.content, ANSWER)
    same([model.id for model in client.models.list()], [MODEL])


def chat_stream() -> None:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, stream_options={"include_usage": True}) as got:
        text = "".join(event.delta for event in got if event.type == "content.delta")
        final = got.get_final_completion()
    same((text, final.choices[0].message.content), (ANSWER, ANSWER))
    same(final.usage.completion_tokens > 0, True)


def chat_tools() -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    message = chat(tools=tools).choices[0].message
    [call] = message.tool_calls
    same((call.function.name, json.loads(call.function.arguments)), ("add", {"a": 2, "b": 2}))
    turns = [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    same(chat(tools=tools, messages=MESSAGES + turns).choices[0].message.content, ANSWER)


def chat_structured() -> None:
    found = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Answer)
    same(found.choices[0].message.parsed, Answer(answer=4))


def chat_seed() -> None:
    seeded(lambda seed: chat(seed=seed, temperature=1, max_tokens=24).choices[0].message.content)


def responses(**more: object) -> object:
    return client.responses.create(**{"model": MODEL, "input": QUESTION, "store": False, **more})


def responses_plain() -> None:
    same(responses(instructions="Answer briefly.", max_output_tokens=100).output_text, ANSWER)


def responses_stream() -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, store=False) as got:
        text = "".join(event.delta for event in got if event.type == "response.output_text.delta")
        same((text, got.get_final_response().output_text), (ANSWER, ANSWER))


def responses_tools() -> None:
    tools = [{"type": "function", **FUNCTION}]
    response = responses(tools=tools)
    [call] = [item for item in response.output if item.type == "function_call"]
    same((call.name, json.loads(call.arguments)), ("add", {"a": 2, "b": 2}))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    asked = [{"role": "user", "content": QUESTION}, *response.output, result]
    same(responses(tools=tools, input=asked).output_text, ANSWER)


def responses_structured() -> None:
    found = client.responses.parse(model=MODEL, input=QUESTION, text_format=Answer, store=False)
    same(found.output_parsed, Answer(answer=4))


def responses_seed() -> None:
    def ask(seed: int) -> str:
        return responses(temperature=1, max_output_tokens=24, extra_body={"seed": seed}).output_text

    seeded(ask)


def reasoning() -> None:
    response = responses(reasoning={"effort": "medium"})
    same([item.type for item in response.output], ["reasoning", "message"])
    asked = [{"role": "user", "content": QUESTION}, *response.output, {"role": "user", "content": "And 3 + 1?"}]
    same(responses(input=asked).output_text, ANSWER)


def completions_plain() -> None:
    same(bool(client.completions.create(model=MODEL, prompt="Two and two", max_tokens=8).choices[0].text), True)


def completions_stream() -> None:
    pieces = client.completions.create(model=MODEL, prompt="Two and two", max_tokens=8, stream=True)
    same(bool("".join(piece.choices[0].text for piece in pieces)), True)


def completions_seed() -> None:
    def ask(seed: int) -> str:
        found = client.completions.create(model=MODEL, prompt="Two", max_tokens=24, temperature=1, seed=seed)
        return found.choices[0].text

    seeded(ask)


run(
    "chat/completions",
    {
        "plain": chat_plain,
        "stream": chat_stream,
        "tools": (chat_tools, ADD),
        "structured": chat_structured,
        "seed": (chat_seed, DRAWN),
    },
)
run(
    "responses",
    {
        "plain": responses_plain,
        "stream": responses_stream,
        "tools": (responses_tools, ADD),
        "structured": responses_structured,
        "seed": (responses_seed, DRAWN),
        "reasoning": (reasoning, {"thoughts": "Two and two."}),
    },
)
run(
    "completions",
    {
        "plain": (completions_plain, FREE),
        "stream": (completions_stream, FREE),
        "seed": (completions_seed, DRAWN),
    },
)

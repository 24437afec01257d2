"""LiteLLM as a library, with its provider for servers that speak OpenAI's API."""

import json

import litellm
from pydantic import BaseModel
from tries import ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, ROOT, run, same, seeded

litellm.telemetry = False
WHERE = {"model": f"openai/{MODEL}", "api_base": BASE, "api_key": KEY, "max_retries": 0, "timeout": 60}
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class Answer(BaseModel):
    answer: int


def tries(where: dict) -> dict:
    def ask(**more: object) -> object:
        return litellm.completion(**{**where, "messages": MESSAGES, **more})

    def plain() -> None:
        same(ask().choices[0].message.content, ANSWER)

    def stream() -> None:
        pieces = ask(stream=True, stream_options={"include_usage": True})
        same("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices), ANSWER)

    def tools() -> None:
        message = ask(tools=[TOOL], tool_choice="auto").choices[0].message
        [call] = message.tool_calls
        same((call.function.name, json.loads(call.function.arguments)), ("add", {"a": 2, "b": 2}))
        turns = [message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
        same(ask(tools=[TOOL], messages=MESSAGES + turns).choices[0].message.content, ANSWER)

    def structured() -> None:
        same(Answer.model_validate_json(ask(response_format=Answer).choices[0].message.content), Answer(answer=4))

    def seed() -> None:
        seeded(lambda number: ask(extra_body={"seed": number}, max_tokens=24).choices[0].message.content)

    return {
        "plain": plain,
        "stream": stream,
        "tools": (tools, ADD),
        "structured": structured,
        "seed": (seed, DRAWN),
    }


def responses_plain() -> None:
    found = litellm.responses(**WHERE, input=QUESTION, store=False)
    same(found.output_text, ANSWER)


run("chat/completions", tries(WHERE))
run("responses", {"plain": responses_plain})
run("messages", tries({**WHERE, "model": f"anthropic/{MODEL}", "api_base": ROOT}))

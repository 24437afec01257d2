"""Tool calls over HTTP: the name first, then the arguments, the same in both kinds of answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, begin, call
from fakes import FakeEngine, Step, chat, make_app, output

from engine import ChoiceDelta, ModelConfig, PreparedRequest, Registry, Tool, ToolCall
from server.app import create_app

TOOL = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}}
ONE = ToolCall("call_a", "ping", '{"host": "é\u2028"}')
TWO = ToolCall("call_b", "ping", "{}")


def script(request: PreparedRequest) -> Iterable[Step]:
    n = request.params.n
    yield output(request, [ChoiceDelta(c, "Now.", (1,)) for c in range(n)], n)
    yield output(request, [ChoiceDelta(c, "", (2,), tool_calls=(ONE,)) for c in range(n)], 2 * n)
    last = [ChoiceDelta(c, "", (3,), None, "tool_calls", tool_calls=(TWO,)) for c in range(n)]
    yield output(request, last, 3 * n, finished=True)


def silent(request: PreparedRequest) -> Iterable[Step]:
    yield output(request, [ChoiceDelta(0, "", (1,), None, "tool_calls", tool_calls=(TWO,))], 1, finished=True)


def ask(play: Any = script, **fields: Any) -> Answer:
    app = make_app(FakeEngine(play))

    async def main() -> Answer:
        return await begin(app, chat(tools=[TOOL], **fields)).ended(5)

    return asyncio.run(main())


def test_a_message_with_calls() -> None:
    for choice in ask(n=2).json["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Now."
        assert choice["message"]["tool_calls"] == [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in (ONE, TWO)
        ]
    [choice] = ask(silent).json["choices"]
    assert choice["message"]["content"] is None


def test_a_stream_of_calls() -> None:
    *events, done = ask(n=2, stream=True).events
    assert done == "[DONE]"
    for index in range(2):
        choices = [c for e in events for c in e["choices"] if c["index"] == index]
        parts = [part for c in choices for part in c["delta"].get("tool_calls", [])]
        assert [p["index"] for p in parts] == [0, 0, 1, 1]
        assert [(p["id"], p["type"], p["function"]) for p in parts[::2]] == [
            (call.id, "function", {"name": "ping", "arguments": ""}) for call in (ONE, TWO)
        ]
        assert ["id" in p for p in parts] == [True, False, True, False]
        assert ["name" in p["function"] for p in parts] == [True, False, True, False]
        assert [p["function"]["arguments"] for p in parts[1::2]] == [ONE.arguments, TWO.arguments]
        assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_conversation_with_results_goes_on() -> None:
    call = {"id": "call_a", "type": "function", "function": {"name": "ping", "arguments": ""}}
    messages = [
        {"role": "user", "content": "ping"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_a", "content": [{"type": "text", "text": "pong"}]},
    ]
    answer = ask(messages=messages)
    assert answer.status == 200, answer.body
    assert "x-ignored-fields" not in answer.headers


def test_a_reply_of_half_a_call_has_an_empty_text_in_both_kinds_of_answer() -> None:
    """The engine leaves such a call out. Null is for turns that call."""

    def half(request: PreparedRequest) -> Iterable[Step]:
        yield output(request, [ChoiceDelta(0, "", (1,), None, "length")], 1, finished=True)

    whole = ask(half).json["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("", "length")
    assert "tool_calls" not in whole["message"]
    deltas = [choice["delta"] for part in ask(half, stream=True).events[:-1] for choice in part["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    assert deltas[0]["content"] == ""
    assert not any("tool_calls" in delta for delta in deltas)


def test_every_member_of_a_call_is_taken_named_or_refused() -> None:
    made = {"id": "call_a", "type": None, "zzz": 1, "function": {"name": "ping", "arguments": "{}", "yyy": 1}}
    messages = [{"role": "assistant", "tool_calls": [made]}, {"role": "user", "content": "?"}]
    answer = ask(messages=messages)
    assert answer.status == 200, answer.body
    at = "messages.0.tool_calls.0"
    assert set(answer.headers["x-ignored-fields"].split(", ")) == {f"{at}.zzz", f"{at}.function.yyy"}
    del made["zzz"]
    refused = call(make_app(FakeEngine(script), strict_params=True), chat(messages=messages))
    assert refused.status == 422
    assert f"{at}.function.yyy" in refused.error["message"]


def test_what_the_engine_is_told() -> None:
    engine = FakeEngine(script)
    app = make_app(engine)

    async def main(**fields: Any) -> None:
        await begin(app, chat(**fields)).ended(5)

    definition = {"name": "ping", "description": "x", "parameters": {}, "strict": False}
    asyncio.run(main(tools=[{"type": "function", "function": definition}], parallel_tool_calls=False))
    asyncio.run(main(tools=[TOOL], tool_choice="none"))
    asyncio.run(main(tools=[TOOL], tool_choice=None, parallel_tool_calls=None))
    first, second, third = engine.requests[-3:]
    assert first.tools == (Tool("ping", "x", {}),)
    assert not first.parallel_tool_calls
    assert second.tools == ()
    assert (third.tools, third.parallel_tool_calls) == ((Tool("ping", parameters={"type": "object"}),), True)


# -- with a real engine -----------------------------------------------------------------------------------------------

SWITCH: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "switch",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "switch"}}


@pytest.fixture(scope="module")
def real(tiny: Callable[[str], Path]) -> Iterator[Any]:
    config = ModelConfig(id="fake", path=tiny("qwen3"), cache_size="8MiB", context_length=1024, threads=1)  # type: ignore[arg-type]
    registry = Registry([config])
    registry.start()
    registry.wait()
    yield create_app(registry)
    registry.close()


def answer(app: Any, **fields: Any) -> Answer:
    async def main() -> Answer:
        return await begin(app, chat(**{"tools": [SWITCH], "max_tokens": 150, **fields})).ended(30)

    return asyncio.run(main())


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_forced_call_is_the_same_in_a_stream(real: Any, choice: Any, seed: int) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": False, "seed": seed}
    [whole] = answer(real, **fields).json["choices"]
    *events, _ = answer(real, stream=True, **fields).events
    parts = [part for e in events for c in e["choices"] for part in c["delta"].get("tool_calls", [])]
    [call] = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    assert json.loads(call["function"]["arguments"])["on"] in (True, False)
    assert (parts[0]["id"], parts[0]["function"]["name"]) == (call["id"], "switch")
    assert "".join(p["function"]["arguments"] for p in parts) == call["function"]["arguments"]


def test_a_strict_tool_leaves_text_free(real: Any) -> None:
    strict = {**SWITCH, "function": {**SWITCH["function"], "strict": True}}
    [choice] = answer(real, tools=[strict], seed=1, max_tokens=40).json["choices"]
    assert choice["message"]["content"] or choice["message"].get("tool_calls")


def test_a_strict_schema_that_cannot_be_enforced(real: Any) -> None:
    function = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    refused = answer(real, tools=[{"type": "function", "function": function}])
    assert (refused.status, refused.error["param"]) == (422, "tools.0.function.parameters")
    assert refused.error["code"] == "schema_not_enforceable"
    assert refused.error["pointer"] == "/properties/a/not"


def test_a_form_and_tools(real: Any) -> None:
    """A reply is a call, or the form; with a choice that asks for a call, a call."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 2]}}}
    kinds = set()
    for seed in range(6):
        [choice] = answer(real, response_format=form, seed=seed).json["choices"]
        kinds.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            assert choice["message"]["content"] in ("1", "2")
    assert "stop" in kinds
    [choice] = answer(real, response_format=form, tool_choice=NAMED, seed=1).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert "schema_error" not in choice
    refused = answer(real, guided_grammar='start: "a"')
    assert (refused.status, refused.error["param"]) == (422, "guided_grammar")

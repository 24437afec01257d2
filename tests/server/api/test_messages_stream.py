"""A streamed message is the whole one, however its reply was cut; every event is one of Anthropic's client."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from anthropic.types import Message
from asgi import Answer
from fakes import FakeEngine, Step, make_app, output
from hypothesis import example, given, settings, strategies as st
from message_shapes import accumulated, ask, events_of, message_of

from engine import ChoiceDelta, NumericalFault, PreparedRequest, ToolCall

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
ARGUMENTS = st.sampled_from(
    ["{}", '{"a": 1}', '{"a": [1.5, null, {"b": "é\\u2028\\n"}]}', '{"big": 1e999, "small": [-1e999]}', "{", "[1]"]
) | st.dictionaries(TEXT, st.integers() | TEXT, max_size=2).map(json.dumps)
CALLS = st.lists(st.tuples(st.sampled_from(["ping", "pong"]), ARGUMENTS), max_size=2)
DELTAS = st.lists(st.tuples(TEXT, TEXT, CALLS), max_size=6)
ENDS = st.tuples(
    st.sampled_from(["stop", "length", "tool_calls"]), st.sampled_from([None, "END"]), st.sampled_from([None, "", "x"])
)
DEEP = "{" + '"a":{' * 200 + "}" * 201


def played(deltas: list[tuple[str, str, list[tuple[str, str]]]], end: tuple[Any, Any, Any]) -> FakeEngine:
    """An engine whose reply is in these deltas; the last one also ends it."""
    reason, stop, schema_error = end
    parts = deltas or [("", "", [])]

    def script(request: PreparedRequest) -> Iterable[Step]:
        for i, (reasoning, text, calls) in enumerate(parts):
            last = i + 1 == len(parts)
            made = tuple(ToolCall(f"call_{i}_{j}", name, arguments) for j, (name, arguments) in enumerate(calls))
            ends = {"finish_reason": reason, "stop_string": stop, "schema_error": schema_error} if last else {}
            delta = ChoiceDelta(0, text, (i,), reasoning=reasoning, tool_calls=made, **ends)
            yield output(request, [delta], i + 1, finished=last)

    return FakeEngine(script)


@given(deltas=DELTAS, end=ENDS)
@example(deltas=[("a", "b", [("ping", "{}")]), ("c", "d", [])], end=("tool_calls", None, None))
@example(deltas=[("", "", [("ping", DEEP)])], end=("tool_calls", None, None))
@settings(max_examples=200, deadline=None)
def test_a_stream_is_the_whole_message(
    deltas: list[tuple[str, str, list[tuple[str, str]]]], end: tuple[Any, Any, Any]
) -> None:
    app = make_app(played(deltas, end))
    whole = message_of(ask(app))
    streamed = message_of(ask(app, stream=True))
    assert {**streamed, "id": ""} == {**whole, "id": ""}
    texts = {kind: "".join(b[kind] for b in whole["content"] if b["type"] == kind) for kind in ("text", "thinking")}
    assert texts["thinking"] == "".join(reasoning for reasoning, _, _ in deltas)
    calls = [block for block in whole["content"] if block["type"] == "tool_use"]
    assert (whole["stop_reason"] == "tool_use") == bool(calls and end[0] == "tool_calls")
    assert (whole["stop_sequence"] is not None) == (whole["stop_reason"] == "stop_sequence")
    assert all(block[block["type"]] for block in whole["content"] if block["type"] != "tool_use")
    if not any(calls for _, _, calls in deltas):
        assert texts["text"] == "".join(text for _, text, _ in deltas)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a": 1}', {"a": 1}),
        ('{"a": 1e999}', {"a": 1.7976931348623157e308}),
        ("[1]", None),
        ("{", None),
        (DEEP, None),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ('{"a": "\\ud83d"}', None),
        ('{"\\ude00": 1}', None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_has_an_object_or_is_text(arguments: str, shown: Any, stream: bool) -> None:
    """`input` is an object of JSON in every client; what cannot be one is not lost, and is no call."""
    engine = played([("", "", [("ping", arguments)])], ("tool_calls", None, None))
    message = message_of(ask(make_app(engine), stream=stream))
    [block] = message["content"]
    if shown is None:
        assert message["stop_reason"] == "end_turn"
        assert json.loads(block["text"]) == {"name": "ping", "arguments": arguments}
    else:
        assert (block["id"], block["name"], block["input"]) == ("call_0_0", "ping", shown)


def test_blocks_are_in_the_order_in_which_they_were_written() -> None:
    deltas = [("hm", "", []), ("", "One ", []), ("", "two.", [("ping", "{}"), ("pong", "{}")]), ("", "And", [])]
    events = events_of(ask(make_app(played(deltas, ("tool_calls", None, None))), stream=True))
    assert [block["type"] for block in accumulated(events)["content"]] == [
        "thinking", "text", "tool_use", "tool_use", "text",
    ]  # fmt: skip
    thinking = [event["delta"]["type"] for event in events if event.get("index") == 0 and "delta" in event]
    assert thinking == ["thinking_delta", "signature_delta"]


def failing(request: PreparedRequest) -> Iterable[Step]:
    yield output(request, [ChoiceDelta(0, "Hel", (1,))], 1)
    yield output(request, [], 1, finished=True, error=NumericalFault("the model computed NaN."))


def failing_at_once(request: PreparedRequest) -> Iterable[Step]:
    yield output(request, [], 0, finished=True, error=NumericalFault("the model computed NaN."))


def test_an_error_after_the_first_byte_ends_the_stream_in_anthropics_shape() -> None:
    events = events_of(ask(make_app(FakeEngine(failing)), stream=True))
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "error"
    assert (events[-1]["error"]["type"], events[-1]["error"]["code"]) == ("overloaded_error", "numerical_fault")
    assert "message_stop" not in {event["type"] for event in events}


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_it_is_a_status(stream: bool) -> None:
    answer: Answer = ask(make_app(FakeEngine(failing_at_once)), stream=stream)
    assert answer.status == 503
    assert answer.json["type"] == "error"
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == answer.json["request_id"]


def test_the_usage_counts_the_prompt_once() -> None:
    """Tokens from the cache are no part of `input_tokens`; the first event has the same sum as the last."""
    events = events_of(ask(make_app(), stream=True))
    for usage in (events[0]["message"]["usage"], events[-2]["usage"]):
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (3, 2)
        assert usage["cache_creation_input_tokens"] == 0
    assert (events[0]["message"]["usage"]["output_tokens"], events[-2]["usage"]["output_tokens"]) == (0, 4)
    assert Message.model_validate(accumulated(events)).usage.output_tokens == 4

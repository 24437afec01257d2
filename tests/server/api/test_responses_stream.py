"""The stream of a response is its whole answer, however it was cut; it ends once, and never half."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
import response_events
from asgi import begin
from fakes import FakeEngine, Step, make_app, output, token
from hypothesis import given, settings, strategies as st
from openai.types.responses import Response

from engine import ChoiceDelta, EngineDead, PreparedRequest, SamplingParams, ToolCall, Usage
from server.api.generation import Reply
from server.api.responses.reply import ResponseCollector, ResponseEvents

PATH = "/v1/responses"
TEXT = st.text(st.sampled_from('aé \n\u2028🤷\\"'), min_size=1, max_size=4)
CALL = st.builds(ToolCall, TEXT.map("call_{}".format), st.sampled_from(["ping", "net.ping"]), TEXT)
ATOMS = st.lists(st.tuples(st.just("think"), TEXT) | st.tuples(st.just("say"), TEXT) | st.tuples(st.just("call"), CALL))


def reply_of(**params: Any) -> Reply:
    prepared = PreparedRequest(
        request_id="resp_0a", prompt_token_ids=(1, 2), params=SamplingParams(seed=3, max_tokens=9, **params)
    )
    repeated = {"fields": {"metadata": {"a": "b"}}, "names": {"net.ping": ("net", "ping")}, "packed": True}
    return Reply("resp_0a", 1_700_000_000, "fake", "fp", (prepared,), None, repeated)


def steps(atoms: list[tuple[str, Any]], cuts: list[bool], finish: Any, *, logprobs: bool) -> list[ChoiceDelta]:
    """Deltas of these pieces, in which some neighbours come together: thoughts before text before calls, as ever."""
    order = ["think", "say", "call"]
    groups: list[list[tuple[int, str, Any]]] = []
    for i, (kind, value) in enumerate(atoms):
        joins = groups and cuts[i % len(cuts)] and order.index(kind) >= order.index(groups[-1][-1][1])
        (groups[-1].append if joins else lambda one: groups.append([one]))((i, kind, value))  # type: ignore[list-item]
    deltas = [
        ChoiceDelta(
            0,
            "".join(value for _, kind, value in group if kind == "say"),
            tuple(i for i, _, _ in group),
            tuple(token(i, "x") for i, _, _ in group) if logprobs else None,
            reasoning="".join(value for _, kind, value in group if kind == "think"),
            tool_calls=tuple(value for _, kind, value in group if kind == "call"),
        )
        for group in groups
    ]
    return [*deltas, ChoiceDelta(0, "", (99,), (token(99, ""),) if logprobs else None, finish)]


def written(reply: Reply, deltas: list[ChoiceDelta]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the events."""
    whole, stream = ResponseCollector(reply), ResponseEvents(reply, False)
    data = stream.start()
    for i, delta in enumerate(deltas):
        told = output(reply.requests[0], [delta], i + 1, finished=delta is deltas[-1])
        whole.add(told)
        data += stream.add(told)
    assert whole.complete
    data += stream.end(Usage(2, len(deltas)), b"")
    return whole.body(), response_events.read(data)


@given(
    atoms=ATOMS,
    cuts=st.lists(st.booleans(), min_size=1, max_size=8),
    length=st.booleans(),
    logprobs=st.booleans(),
    tokens=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_however_a_reply_is_cut_its_events_are_its_answer(
    atoms: list[tuple[str, Any]], cuts: list[bool], length: bool, logprobs: bool, tokens: bool
) -> None:
    called = any(kind == "call" for kind, _ in atoms)
    finish = "length" if length else "tool_calls" if called else "stop"
    reply = reply_of(logprobs=logprobs, return_token_ids=tokens)
    body, events = written(reply, steps(atoms, cuts, finish, logprobs=logprobs))
    Response.model_validate(body)
    assert response_events.collected(events) == body
    alone, _ = written(reply, steps(atoms, [False], finish, logprobs=logprobs))
    for name in ("output", "status", "incomplete_details", "token_ids"):
        assert alone.get(name) == body.get(name)
    joined = {kind: "".join(v for k, v in atoms if k == kind) for kind in ("think", "say")}
    for kind, inside in (("reasoning", "think"), ("message", "say")):
        texts = [part["text"] for item in body["output"] if item["type"] == kind for part in item["content"]]
        assert "".join(texts) == joined[inside]
    assert [(c["call_id"], c["arguments"]) for c in body["output"] if c["type"] == "function_call"] == [
        (call.id, call.arguments) for kind, call in atoms if kind == "call"
    ]
    if finish == "stop":
        assert body["output"][-1]["type"] == "message" or joined["think"]
    ids = [item["id"] for item in body["output"]]
    assert len(set(ids)) == len(ids)
    if logprobs and [kind for kind, _ in atoms if kind != "call"][-1:] == ["say"]:
        told = [e for item in body["output"] if item["type"] == "message" for e in item["content"][0]["logprobs"]]
        assert len(told) == len(atoms) + 1  # one for each token


def test_a_name_in_a_namespace_is_told_as_the_client_gave_it() -> None:
    deltas = [ChoiceDelta(0, "", (1,), None, "tool_calls", tool_calls=(ToolCall("call_1", "net.ping", "{}"),))]
    body, events = written(reply_of(), deltas)
    [call] = body["output"]
    assert (call["namespace"], call["name"], call["call_id"]) == ("net", "ping", "call_1")
    assert events[2]["item"]["namespace"] == "net"


def test_a_reply_without_a_word_is_an_empty_message() -> None:
    """Agents take a response without a message for one that is not finished, and ask again."""
    body, _ = written(reply_of(), [ChoiceDelta(0, "", (1,), None, "stop", reasoning="hm")])
    assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
    assert Response.model_validate(body).output_text == ""


@pytest.mark.parametrize("reasoning", ["", "hm"])
def test_a_reply_that_was_cut_is_incomplete(reasoning: str) -> None:
    body, events = written(reply_of(), [ChoiceDelta(0, "", (1,), None, "length", reasoning=reasoning)])
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in body["output"]] == ["incomplete"] * bool(reasoning)
    assert events[-1]["type"] == "response.incomplete"


# -- over HTTP --------------------------------------------------------------------------------------------------------


def stream(script: Any, **settings_: Any) -> Any:
    app = make_app(FakeEngine(script), **settings_)

    async def main() -> Any:
        body = b'{"model":"fake","input":"Hi","stream":true}'
        return await begin(app, body, path=PATH).ended(10)

    return asyncio.run(main())


def fails_late(request: PreparedRequest) -> Iterable[Step]:
    yield output(request, [ChoiceDelta(0, "", (1,), reasoning="hm")], 1)
    yield output(request, [ChoiceDelta(0, "Hel", (2,))], 2)
    yield 0.05
    yield output(request, [], 2, finished=True, error=EngineDead("the engine has stopped."))


def fails_at_once(request: PreparedRequest) -> Iterable[Step]:
    yield output(request, [], 0, finished=True, error=EngineDead("the engine has stopped."))


def fails_after_a_wait(request: PreparedRequest) -> Iterable[Step]:
    yield 0.1
    yield from fails_at_once(request)


def test_an_error_before_the_first_event_is_a_status() -> None:
    answer = stream(fails_at_once)
    assert (answer.status, answer.error["code"]) == (503, "engine_dead")


@pytest.mark.parametrize("script", [fails_late, fails_after_a_wait])
def test_an_error_later_ends_the_stream_with_a_failed_response(script: Any) -> None:
    """Also where nothing but comments had been sent: no client takes a stream that does not begin at its beginning."""
    answer = stream(script, keepalive_seconds=0.01)
    assert answer.status == 200
    events = response_events.read(answer.body)
    assert [told["type"] for told in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == "response.failed"
    found = Response.model_validate(last["response"])
    assert found.status == "failed"
    assert found.error is not None
    assert found.error.message == "the engine has stopped."
    assert (found.error.code, last["response"]["error"]["type"]) == ("server_error", "engine_dead")
    done = [told["item"] for told in events if told["type"] == "response.output_item.done"]
    assert last["response"]["output"] == done

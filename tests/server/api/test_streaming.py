"""A stream is the same answer in pieces: the same text, logprobs, ids and numbers, and an end that says it is one."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from asgi import Answer, begin, call, run
from fakes import HELLO, SILENT, FakeEngine, Step, chat, make_app, output, token, word_by_word
from hypothesis import given, settings, strategies as st

from engine import ChoiceDelta, EngineDead, OutOfMemory, PreparedRequest, TokenLogprob
from server.json_text import to_json


def streamed(app: Any, **fields: Any) -> Answer:
    return call(app, chat(stream=True, **fields))


def joined(events: list[Any], n: int) -> list[dict[str, Any]]:
    """The choices that a client puts together from a stream."""
    choices: list[dict[str, Any]] = [
        {"content": None, "logprobs": None, "token_ids": [], "finish_reason": None} for _ in range(n)
    ]
    for event in events:
        for part in event["choices"]:
            choice = choices[part["index"]]
            assert choice["finish_reason"] is None, "something came after the end of a choice"
            if "content" in part["delta"]:
                choice["content"] = (choice["content"] or "") + part["delta"]["content"]
            if part["logprobs"]:
                entries = (choice["logprobs"] or {"content": []})["content"] + part["logprobs"]["content"]
                choice["logprobs"] = {"content": entries, "refusal": None}
            choice["token_ids"] += part.get("token_ids", [])
            choice["finish_reason"] = part["finish_reason"]
    return choices


# -- a random answer, randomly cut -----------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(
    ["\u2028", "\x85", "\r\n", "data: ", "\n\n", "[DONE]", '"', "\\", "\U0001f600", "</s>", "\x00"]
)


@st.composite
def steps_of_answer(draw: st.DrawFn) -> tuple[int, bool, list[list[ChoiceDelta]]]:
    """n, logprobs, and what each step adds to each choice. Text may come later than the token it belongs to."""
    n = draw(st.integers(1, 3))
    logprobs = draw(st.booleans())
    queues: list[list[ChoiceDelta]] = []
    for index in range(n):
        words = draw(st.lists(TEXT, min_size=1, max_size=5))
        held, mine = "", []
        for i, word in enumerate(words):
            held += word
            last = i + 1 == len(words)
            text = held if last or draw(st.booleans()) else ""
            held = "" if text else held
            entries: tuple[TokenLogprob, ...] | None = (token(i, word, top=draw(st.integers(0, 2))),)
            finish = draw(st.sampled_from(["stop", "length"])) if last else None
            mine.append(ChoiceDelta(index, text, (i,), entries if logprobs else None, finish))  # type: ignore[arg-type]
        queues.append(mine)
    steps = []
    while any(queues):
        moving = [q for q in queues if q and draw(st.booleans())] or [next(q for q in queues if q)]
        steps.append([q.pop(0) for q in moving])
    return n, logprobs, steps


def play(steps: list[list[ChoiceDelta]]) -> Callable[[PreparedRequest], Iterable[Step]]:
    def script(request: PreparedRequest) -> Iterable[Step]:
        tokens = 0
        for i, deltas in enumerate(steps):
            tokens += sum(len(d.token_ids) for d in deltas)
            yield output(request, deltas, tokens, finished=i + 1 == len(steps))

    return script


@given(answer=steps_of_answer(), ids=st.booleans(), usage=st.booleans())
@settings(max_examples=150, deadline=None)
def test_concatenated_deltas_are_the_synchronous_answer(
    answer: tuple[int, bool, list[list[ChoiceDelta]]], ids: bool, usage: bool
) -> None:
    n, logprobs, steps = answer
    app = make_app(FakeEngine(play(steps)))
    fields = {"n": n, "logprobs": logprobs, "return_token_ids": ids}
    whole = call(app, chat(**fields)).json
    *events, done = streamed(app, **fields, stream_options={"include_usage": usage}).events
    assert done == "[DONE]"
    if usage:
        *events, last = events
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all((event["usage"] is None) if usage else ("usage" not in event) for event in events)
    for choice, mine in zip(whole["choices"], joined(events, n), strict=True):
        assert mine["content"] == choice["message"]["content"]
        assert mine["finish_reason"] == choice["finish_reason"]
        assert mine["token_ids"] == choice.get("token_ids", [])
        assert (mine["logprobs"] or {"content": []})["content"] == (choice["logprobs"] or {"content": []})["content"]
        assert (choice["logprobs"] is not None) == logprobs
    assert all(event[key] == whole[key] for event in events for key in ("model", "system_fingerprint", "seed"))
    assert len({(event["id"], event["created"]) for event in events}) == 1


# -- the order of events ---------------------------------------------------------------------------------------------


def test_a_stream_begins_with_roles_and_ends_with_reasons() -> None:
    *events, done = streamed(make_app(), n=2).events
    assert done == "[DONE]"
    first = [(e["choices"][0]["index"], e["choices"][0]["delta"]) for e in events[:2]]
    assert first == [(i, {"role": "assistant", "content": "", "refusal": None}) for i in (0, 1)]
    assert not any("role" in e["choices"][0]["delta"] for e in events[2:])
    closing = [e["choices"][0] for e in events if e["choices"][0]["finish_reason"]]
    assert [(c["index"], c["delta"], c["finish_reason"]) for c in closing] == [(0, {}, "stop"), (1, {}, "stop")]
    assert all(e["object"] == "chat.completion.chunk" for e in events)


def test_the_headers_of_a_stream() -> None:
    headers = streamed(make_app(), foo=1).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-ignored-fields"] == "foo"
    assert headers["x-request-id"]
    assert "content-length" not in headers


def test_a_choice_that_says_nothing_still_has_an_empty_text() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        yield output(request, [ChoiceDelta(0, "", (2,), None, "stop")], 1, finished=True)

    app = make_app(FakeEngine(script))
    [choice] = joined(streamed(app).events[:-1], 1)
    assert (choice["content"], choice["finish_reason"]) == ("", "stop")
    assert call(app, chat()).json["choices"][0]["message"]["content"] == ""


def test_a_step_without_news_sends_nothing() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        yield output(request, [ChoiceDelta(0, "", (1,))], 1)
        yield output(request, [ChoiceDelta(0, "ab", (2,), None, "length")], 2, finished=True)

    assert [e["choices"][0]["delta"] for e in streamed(make_app(FakeEngine(script))).events[:-1]] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "ab"},
        {},
    ]


def test_several_choices_of_one_step_leave_in_one_send() -> None:
    async def count() -> int:
        exchange = begin(make_app(FakeEngine(word_by_word("a", "b"))), chat(stream=True, n=4))
        await exchange.ended()
        return sum(m["type"] == "http.response.body" for m in exchange.messages)

    assert run(count()) == 2


def test_minus_infinity_is_a_number_that_json_has() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        entry = TokenLogprob(1, "a", b"\xff", float("-inf"))
        yield output(request, [ChoiceDelta(0, "a", (1,), (entry,), "stop")], 1, finished=True)

    app = make_app(FakeEngine(script))
    expected = [{"token": "a", "logprob": -9999.0, "bytes": [255], "top_logprobs": []}]
    assert call(app, chat(logprobs=True)).json["choices"][0]["logprobs"]["content"] == expected
    assert joined(streamed(app, logprobs=True).events[:-1], 1)[0]["logprobs"]["content"] == expected


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\x85", "\n", "\r", "\x0b", "\x0c", "\x1c", "\x1e", "\ufeff"])
def test_no_text_ends_a_line_of_the_stream(text: str) -> None:
    """Many clients split lines as `str.splitlines` does, at more characters than the event stream has."""
    app = make_app(FakeEngine(word_by_word(f"a{text}b", "!")))
    body = streamed(app, logprobs=True).body.decode()
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    assert joined(events, 1)[0]["content"] == f"a{text}b!"
    assert len(body.splitlines()) == body.count("\n")


def test_no_byte_sequence_is_cut_between_two_sends() -> None:
    """A client that decodes each piece by itself must not meet half a character."""

    async def pieces() -> list[bytes]:
        exchange = begin(make_app(FakeEngine(word_by_word("é", "\U0001f600", "語"))), chat(stream=True))
        await exchange.ended()
        return [m["body"] for m in exchange.messages[1:]]

    for piece in run(pieces()):
        codecs.decode(piece, "utf-8", "strict")


def test_json_has_no_infinities() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"x": float("inf")})


# -- while nothing happens -------------------------------------------------------------------------------------------


def test_a_silent_stream_is_kept_alive_with_comments() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        yield 0.1
        yield output(request, [ChoiceDelta(0, "a", (1,))], 1)
        yield 0.1
        yield output(request, [ChoiceDelta(0, "b", (2,), None, "stop")], 2, finished=True)

    answer = streamed(make_app(FakeEngine(script), keepalive_seconds=0.02))
    before, after = answer.body.split(b'"content":"a"')
    assert before.startswith(b": keep-alive\n\n")
    assert before.count(b": keep-alive\n\n") >= 2
    assert after.count(b": keep-alive\n\n") >= 2
    assert joined(answer.events[:-1], 1)[0]["content"] == "ab"


def test_a_busy_stream_has_no_comments() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        for i in range(20):
            yield 0.005
            yield output(request, [ChoiceDelta(0, "a", (i,), None, "stop" if i == 19 else None)], i, finished=i == 19)

    assert b"keep-alive" not in streamed(make_app(FakeEngine(script), keepalive_seconds=0.5)).body


def test_no_comment_comes_after_the_end() -> None:
    """Comments are a task's own affair, which may outlive the stream: what it sends then, nobody awaits."""

    def script(request: PreparedRequest) -> Iterable[Step]:
        yield 0.05
        yield output(request, [ChoiceDelta(0, "a", (1,), None, "stop")], 1, finished=True)

    async def wait_after() -> None:
        exchange = begin(make_app(FakeEngine(script), keepalive_seconds=0.01), chat(stream=True))
        answer = await exchange.ended()
        assert b"keep-alive" in answer.body
        sent = len(exchange.messages)
        await asyncio.sleep(0.1)
        assert (exchange.faults, len(exchange.messages)) == ([], sent)

    run(wait_after())


# -- when it fails ---------------------------------------------------------------------------------------------------


def failing(error: Exception, after: int) -> FakeEngine:
    """Some words, then an engine error; or a bug, for anything else."""

    def script(request: PreparedRequest) -> Iterable[Step]:
        for i in range(after):
            yield output(request, [ChoiceDelta(0, "x", (i,))], i + 1)
            yield 0.01
        yield output(request, [], after, finished=True, error=error)  # type: ignore[arg-type]

    return FakeEngine(script)


def test_an_error_before_the_first_byte_is_a_status() -> None:
    answer = streamed(make_app(failing(OutOfMemory("too long for the cache"), after=0)))
    assert (answer.status, answer.error["code"]) == (503, "out_of_memory")
    assert answer.headers["x-should-retry"] == "false"


def test_an_error_after_the_first_byte_is_one_event_and_the_end() -> None:
    answer = streamed(make_app(failing(EngineDead('stopped: "disk"\n\nfull'), after=2)))
    assert answer.status == 200
    *events, last = answer.events
    assert joined(events, 1)[0]["content"] == "xx"
    assert last == {
        "error": {
            "message": 'stopped: "disk"\n\nfull',
            "type": "server_overloaded",
            "param": None,
            "code": "engine_dead",
        }
    }


def test_an_error_after_a_comment_is_an_event_too() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        yield 0.05
        yield output(request, [], 0, finished=True, error=OutOfMemory("no room"))

    answer = streamed(make_app(FakeEngine(script), keepalive_seconds=0.02))
    assert answer.status == 200
    assert answer.events[-1]["error"]["code"] == "out_of_memory"


def test_words_that_came_with_the_error_are_not_lost() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        yield output(request, [ChoiceDelta(0, "a", (1,))], 1)
        yield 0.01
        yield output(request, [ChoiceDelta(0, "b", (2,))], 2, finished=True, error=EngineDead("gone"))

    *events, last = streamed(make_app(FakeEngine(script))).events
    assert joined(events, 1)[0]["content"] == "ab"
    assert last["error"]["code"] == "engine_dead"


def test_an_error_in_sync_mode_is_a_status_whenever_it_comes() -> None:
    answer = call(make_app(failing(EngineDead("stopped"), after=3)), chat())
    assert (answer.status, answer.error["code"]) == (503, "engine_dead")


def test_a_bug_in_the_middle_is_an_event_with_an_id(caplog: pytest.LogCaptureFixture) -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        yield output(request, [ChoiceDelta(0, "a", (1,))], 1)
        yield 0.01
        yield output(request, [ChoiceDelta(0, 5, (2,))], 2)  # type: ignore[arg-type]
        yield None

    engine = FakeEngine(script)
    last = streamed(make_app(engine)).events[-1]
    assert last["error"]["code"] == "internal_error"
    assert last["error"]["message"].split()[-1].rstrip(".") in caplog.text
    assert engine.open == {}


class Forgetful(FakeEngine):
    """Ends its streams without finishing the request: a broken promise of the interface."""

    async def _play(self, prepared: PreparedRequest, stream: Any) -> None:
        stream.deliver(output(prepared, [ChoiceDelta(0, "a", (1,))], 1))
        await asyncio.sleep(0.01)
        stream.end()


@pytest.mark.parametrize("stream", [False, True])
def test_half_an_answer_is_never_passed_off_as_a_whole_one(stream: bool) -> None:
    answer = call(make_app(Forgetful()), chat(stream=stream))
    if stream:
        assert answer.events[-1]["error"]["code"] == "internal_error"
    else:
        assert (answer.status, answer.error["code"]) == (500, "internal_error")


# -- a slow reader ---------------------------------------------------------------------------------------------------


def test_a_slow_reader_gets_everything_and_holds_up_nobody() -> None:
    words = [f"w{i} " for i in range(200)]
    engine = FakeEngine(word_by_word(*words))
    app = make_app(engine)

    async def both() -> tuple[Answer, Answer]:
        slow = begin(app, chat(stream=True))

        async def lag(message: Any) -> None:
            await asyncio.sleep(0.02)

        slow.on_send = lag
        quick = await begin(app, chat(stream=True)).ended()
        assert not slow.messages or slow.messages[-1].get("more_body", True), "the slow one finished first"
        return await slow.ended(), quick

    slow, quick = run(both())
    for answer in (slow, quick):
        assert joined(answer.events[:-1], 1)[0]["content"] == "".join(words)


def test_streams_run_side_by_side() -> None:
    app = make_app(FakeEngine(HELLO))

    async def crowd() -> list[Answer]:
        exchanges = [begin(app, chat(stream=bool(i % 2))) for i in range(40)]
        return [await e.ended() for e in exchanges]

    answers = run(crowd())
    texts = {
        joined(a.events[:-1], 1)[0]["content"] if i % 2 else a.json["choices"][0]["message"]["content"]
        for i, a in enumerate(answers)
    }
    assert texts == {"Hello wörld!"}
    assert len({(a.events[0] if i % 2 else a.json)["id"] for i, a in enumerate(answers)}) == 40


def test_a_full_queue_is_told_at_once() -> None:
    engine = FakeEngine(SILENT, limit=2)
    app = make_app(engine, retry_after_seconds=3)

    async def third() -> Answer:
        first = [begin(app, chat(stream=True)), begin(app, chat())]
        await first[0].until(lambda: len(engine.open) == 2)
        answer = await begin(app, chat(stream=True)).ended()
        for exchange in first:
            exchange.disconnect()
            assert exchange.task
            await exchange.task
        return answer

    answer = run(third())
    assert (answer.status, answer.error["code"], answer.error["limit"]) == (503, "queue_full", 2)
    assert answer.headers["retry-after"] == "3"
    assert engine.open == {}

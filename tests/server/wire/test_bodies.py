"""Bodies below the limit of size: counted before values are made, parsed off the loop, bounded all together."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import pytest
from asgi import begin, call, run
from fakes import FakeEngine, chat, make_app
from wire_client import LIVE, PATIENCE, good, post, serving

from server import json_text
from server.api import chat_request
from server.api.parsing import ParsedRequest
from server.errors import BodiesFull
from server.settings import ServerSettings
from server.wire import bodies
from server.wire.bodies import Bodies, BodyMemory

SIZE = 8 * 2**20


def filled(unit: str, before: str = "", after: str = "") -> bytes:
    """A good body with as many units in it as fit into the largest that is taken."""
    head = json.dumps(chat())[:-1] + ', "x": [' + before
    count = (SIZE - len(head) - len(after) - 9) // (len(unit) + 1)
    return (head + ",".join([unit] * count) + after + "]}").encode()


def many(name: str, unit: str, count: int) -> bytes:
    fields = {k: v for k, v in chat().items() if k != name}
    opening, closing = ("{", "}") if name == "logit_bias" else ("[", "]")
    units = ",".join(unit.replace("#", str(i)) for i in range(count))
    return (json.dumps(fields)[:-1] + f', "{name}": {opening}{units}{closing}}}').encode()


def called(arguments: str) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


TOO_MANY: list[tuple[str, bytes, str | None, str]] = [
    # name, body, param, words
    ("lists", filled("[]"), None, "more than 200000 values"),
    ("deep lists", filled("[" * 50 + "]" * 50), None, "more than 200000 values"),
    ("objects", filled("{}"), None, "more than 200000 values"),
    ("numbers", filled("1"), None, "more than 200000 values"),
    ("texts", filled('""'), None, "more than 200000 values"),
    ("after an escaped quote", filled("[]", '"\\\\\\"", '), None, "more than 200000 values"),
    ("after an escaped backslash", filled("[]", '"\\\\", '), None, "more than 200000 values"),
    ("names", many("logit_bias", '"#":1', 500_000), None, "more than 200000 values"),
    ("fewer names", many("logit_bias", '"#":1', 150_000), None, "more than 100000 names"),
    ("messages", many("messages", "{}", 10_001), "messages", "at most 10000 messages, not 10001"),
    ("empty messages", many("messages", "{}", 280_000), None, "more than 200000 values"),
    (
        "parts",
        many("messages", json.dumps({"role": "user", "content": [{"type": "text", "text": ""}] * 101}), 100),
        "messages",
        "at most 10000 parts, not 10100",
    ),
    ("biases", many("logit_bias", '"#":1', 16_385), "logit_bias", "at most 16384 entries, not 16385"),
    ("stops", many("stop", '"a"', 100_000), "stop", "at most 16 strings, not 100000"),
    ("stop ids", many("stop_token_ids", "1", 100_000), "stop_token_ids", "at most 256 ids, not 100000"),
    ("tools", many("tools", "{}", 50_000), "tools", "at most 128 definitions, not 50000"),
    ("choices", many("guided_choice", '"a"', 100_000), "guided_choice", "1 to 1024 texts, not 100000"),
    (
        "inside many texts",
        json.dumps(
            chat(messages=[{"role": "assistant", "tool_calls": [called('{"a": [' + "[]," * 60_000 + "1]}")] * 4}])
        ).encode(),
        "messages",
        "more than 200000 values",
    ),
    (
        "inside a text",
        json.dumps(chat(guided_json='{"enum": [' + "[]," * 200_000 + "1]}")).encode(),
        "guided_json",
        "more than 200000 values",
    ),
]


@pytest.mark.parametrize(("body", "param", "words"), [c[1:] for c in TOO_MANY], ids=[c[0] for c in TOO_MANY])
def test_too_many_of_anything_is_one_short_refusal(
    body: bytes, param: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(body) <= SIZE
    if param is None:  # found before anything is made of it
        monkeypatch.setattr(json_text, "json", None)
    answer = call(make_app(), body)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (422, param, "invalid_parameter")
    assert words in answer.error["message"]
    assert len(answer.body) < 1000


TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("a text of commas and brackets", {"user": ",[{" * 10**6}),
    ("a text of quotes", {"user": '"' * 10**6 + "," * 300_000}),
    ("a text of backslashes", {"user": "\\" * 10**6 + "," * 300_000}),
    ("backslashes before the end", {"user": "," * 300_000 + "\\"}),
    ("a list to the limit", {"x": [1] * (json_text.MAX_VALUES - 10)}),
    ("a text of colons", {"user": ":" * 10**6}),
    ("many messages", {"messages": [{"role": "user", "content": ""}] * 10_000}),
]


@pytest.mark.parametrize("fields", [c[1] for c in TAKEN], ids=[c[0] for c in TAKEN])
def test_text_is_not_counted(fields: dict[str, Any]) -> None:
    """What a text spells is no value, however it is escaped; honest code is full of it."""
    parsed = chat_request.parse(json.dumps(chat(**fields)).encode(), "id")
    assert parsed.model == "fake"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "x" * 10**6},
        {"model": "x" * 10**6},
        {"tool_choice": "x" * 10**6},
        {"metadata": "x" * 10**6},
        {"x" * 10**6: 1, "n": 0},
        {"messages": [{"role": "r" * 10**6, "content": ""}]},
        {"guided_json": "x" * 10**6},
        {"guided_json": "[" * 10**5},
        {"seed": int("9" * 4000)},
    ],
    ids=lambda fields: next(iter(fields))[:20],
)
def test_a_refusal_quotes_little(fields: dict[str, Any]) -> None:
    answer = call(make_app(), json.dumps(chat(**fields)).encode())
    assert answer.status in (400, 404, 422)
    assert len(answer.body) < 3000


@pytest.mark.parametrize("padding", [0, 10**5], ids=["on the loop", "on a thread"])
@pytest.mark.parametrize("depth", [100, 101, 950, 100_000])
def test_arguments_of_any_depth_are_taken(depth: int, padding: int) -> None:
    """Deeper than bodies may be, they are what a model wrote and no JSON that is read: the text itself goes on."""
    arguments = '{"a":' * depth + "1" + "}" * depth
    messages = [{"role": "assistant", "tool_calls": [called(arguments)]}, {"role": "user", "content": ""}]
    body = chat(messages=messages, user="u" * padding)
    assert call(make_app(), body).status == 200
    [generation] = chat_request.parse(json.dumps(body).encode(), "id").generations
    assert generation.messages is not None
    assert generation.messages[0].tool_calls[0].arguments == arguments


def test_a_model_with_an_endless_name_is_not_here() -> None:
    answer = call(make_app(), chat(model="x" * 10**6))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")


# -- beside the loop -------------------------------------------------------------------------------------------------


def test_the_loop_goes_on_while_a_body_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a large body is held up; health and small requests are answered meanwhile."""
    begun, going = threading.Event(), threading.Event()
    parse = chat_request.parse

    def held(raw: bytes, request_id: str) -> ParsedRequest:
        if len(raw) > 10**6:
            begun.set()
            assert going.wait(PATIENCE)
        return parse(raw, request_id)

    monkeypatch.setattr(chat_request, "parse", held)
    with serving(make_app()) as running, running.client() as large, running.client() as small:
        large.send(post(good(user="u" * 10**6)))
        assert begun.wait(PATIENCE)
        for _ in range(3):
            small.send(LIVE + post(good()))
            assert [small.reply().status for _ in range(2)] == [200, 200]  # type: ignore[union-attr]
        going.set()
        assert large.reply().status == 200  # type: ignore[union-attr]


# -- memory for all of them ------------------------------------------------------------------------------------------


def test_the_room_is_counted_for_everybody_and_for_each_key() -> None:
    memory = BodyMemory(800)
    memory.take(400, "a", small=False)
    with pytest.raises(BodiesFull, match=r"of this key .* 400 bytes"):
        memory.take(1, "a", small=True)
    memory.take(300, "", small=False)
    with pytest.raises(BodiesFull, match="700 bytes"):
        memory.take(1, "", small=False)
    memory.take(100, "b", small=True)
    with pytest.raises(BodiesFull, match="800 bytes"):
        memory.take(1, "b", small=True)
    memory.give(400, "a")
    memory.take(299, "c", small=False)
    for amount, group in ((300, ""), (100, "b"), (299, "c")):
        memory.give(amount, group)
    assert not memory.taken


LARGE = 256 * 2**10


def half(length: int, *fields: str) -> bytes:
    """A request whose body is announced, and begun."""
    return post(b" " * 100, *(fields or (f"content-length: {length}",)))


def test_bodies_that_are_being_read_are_bounded_all_together() -> None:
    """Large ones fill their part by what they announce, or by what has come; small ones are served all the while."""
    app = make_app(max_body_bytes=LARGE, max_bodies_bytes=2**20)
    with serving(app) as running, contextlib.ExitStack() as stack:
        held = [stack.enter_context(running.client()) for _ in range(3)]
        for client in held[:2]:
            client.send(half(LARGE))
        held[2].send(post(b"", "transfer-encoding: chunked") + b"%x\r\n" % LARGE + b" " * LARGE + b"\r\n")
        with running.client() as client:
            while True:  # until what was sent above has arrived
                client.send(post(b" " * LARGE))
                reply = client.reply()
                assert reply
                if reply.status == 503:
                    break
        assert reply.code == "bodies_full"
        assert int(reply.headers["retry-after"]) > 0
        with running.client() as client:
            client.send(post(good()))
            assert client.reply().status == 200  # type: ignore[union-attr]
        for client in held:
            client.socket.close()
        with running.client() as client:
            while True:
                client.send(post(good(user="u" * (LARGE - 1000))))
                reply = client.reply()
                assert reply
                if reply.status == 200:
                    return


@pytest.mark.parametrize(
    ("body", "how"),
    [
        (good(), "ok"),
        (b"{", "not JSON"),
        (b" " * 5000, "too large"),
        (good(model="nope"), "no model"),
        (good(stream=True), "a stream"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_whatever_becomes_of_a_request_its_room_is_given_back(
    body: bytes, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Bodies] = []

    class Noted(Bodies):
        def __init__(self, settings: ServerSettings) -> None:
            super().__init__(settings)
            made.append(self)

    monkeypatch.setattr("server.app.Bodies", Noted)
    app = make_app(max_body_bytes=4096)
    taken: list[int] = []
    monkeypatch.setattr(FakeEngine, "prepare", _noting(FakeEngine.prepare, made, taken))
    call(app, body)
    assert not made[0].memory.taken
    assert taken == ([len(body)] if how in ("ok", "a stream") else [])


def _noting(prepare: Any, made: list[Bodies], taken: list[int]) -> Any:
    async def noted(self: FakeEngine, request: Any) -> Any:
        taken.append(made[0].memory.taken.total())
        return await prepare(self, request)

    return noted


def test_a_client_that_goes_away_leaves_no_room_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    memories: list[BodyMemory] = []
    monkeypatch.setattr(bodies, "BodyMemory", lambda size: memories.append(BodyMemory(size)) or memories[-1])
    app = make_app()

    async def leave() -> None:
        exchange = begin(app, [b"{", b"}"], headers=[(b"content-length", b"9999")])
        exchange._pending.pop()
        await exchange.until(lambda: memories[0].taken.total() == 9999)
        exchange.disconnect()
        assert exchange.task
        await exchange.task

    run(leave())
    assert not memories[0].taken


def test_the_room_of_a_key_holds_one_body_at_least() -> None:
    with pytest.raises(ValueError, match="max_bodies_bytes must be at least twice max_body_bytes, 16777216"):
        ServerSettings(max_bodies_bytes=10**7)
    memory = Bodies(ServerSettings(max_body_bytes=10**6)).memory
    assert memory.size == 8 * 10**6
    memory.take(10**6, "key", small=False)

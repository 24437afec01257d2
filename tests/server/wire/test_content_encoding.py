"""Bodies that are sent as gzip: what they stand for is read, within the limits of a body, or they are refused."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from asgi import CHAT, Answer, begin, call, run
from fakes import FakeEngine, chat, complete, make_app
from hypothesis import given, strategies as st
from starlette.datastructures import Headers
from wire_client import good, post, serving

from engine import InvalidFormat
from server.settings import ServerSettings
from server.wire import bodies
from server.wire.bodies import Bodies, BodyMemory
from server.wire.content_encoding import MAX_MEMBERS, STEP, decoder_of

GZIP = [(b"content-encoding", b"gzip")]
LIMIT = 256 * 2**10


def decoded(data: bytes, size: int | None = None) -> bytes:
    """What a gzip body stands for, fed in pieces of this size."""
    decoder, size = decoder_of(["gzip"]), size or len(data) or 1
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    parts = [part for piece in pieces for part in decoder.feed(piece)]
    decoder.end()
    assert all(len(part) <= STEP for part in parts)
    return b"".join(parts)


# -- the decoder -------------------------------------------------------------------------------------------------------


@given(
    texts=st.lists(st.binary(max_size=300), min_size=1, max_size=4), level=st.integers(0, 9), size=st.integers(1, 40)
)
def test_what_was_encoded_is_decoded_however_it_is_cut(texts: list[bytes], level: int, size: int) -> None:
    """One member or several, at any level, in pieces of any size."""
    data = b"".join(gzip.compress(text, level) for text in texts)
    assert decoded(data, size) == b"".join(texts)


def test_much_behind_few_bytes_comes_in_small_parts() -> None:
    for text in (bytes(5 * 10**6), random.Random(0).randbytes(10**6)):
        assert decoded(gzip.compress(text)) == text


@given(text=st.binary(min_size=1, max_size=200), data=st.data())
def test_a_body_that_is_cut_or_changed_is_never_taken_for_another(text: bytes, data: st.DataObject) -> None:
    """Checksum and length are checked: either the same text comes out (a byte of the header that says nothing), or a
    refusal."""
    whole = gzip.compress(text, mtime=0)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(InvalidFormat):
        decoded(cut)
    at, bits = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    changed = whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :]
    with contextlib.suppress(InvalidFormat):
        assert decoded(changed) == text


# -- over every endpoint that takes a body -----------------------------------------------------------------------------

WHOLE = gzip.compress(json.dumps(chat()).encode())
BROKEN: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "ends too early"),
    ("not gzip", json.dumps(chat()).encode(), "damaged"),
    ("zlib", zlib.compress(json.dumps(chat()).encode()), "damaged"),
    ("cut", WHOLE[:-9], "ends too early"),
    ("cut in its checksum", WHOLE[:-1], "ends too early"),
    ("another checksum", WHOLE[:-8] + b"\0\0\0\0" + WHOLE[-4:], "damaged"),
    ("something behind it", WHOLE + b"{}", "not gzip follow"),
    ("zeros behind it", WHOLE + bytes(8), "not gzip follow"),
    ("half a member behind it", WHOLE + WHOLE[:9], "ends too early"),
    ("members without end", gzip.compress(b"") * (MAX_MEMBERS + 1), "more than 1024 members"),
]


@pytest.mark.parametrize(("body", "words"), [c[1:] for c in BROKEN], ids=[c[0] for c in BROKEN])
def test_what_is_not_gzip_is_refused_by_name(body: bytes, words: str) -> None:
    answer = call(make_app(), body, headers=GZIP)
    assert (answer.status, answer.error["code"]) == (400, "invalid_content_encoding")
    assert words in answer.error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(seed=1)),
        ("/v1/completions", complete(seed=1)),
        ("/v1/tokenize", {"model": "fake", "prompt": "abc"}),
        ("/tokenize", {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/detokenize", {"model": "fake", "tokens": [1, 2]}),
        ("/v1/receipts/verify", {"no": "receipt"}),
    ],
)
def test_every_endpoint_reads_it(path: str, body: dict[str, Any]) -> None:
    """The answer is that of the same body without an encoding."""

    def told(answer: Answer) -> Any:
        return answer.status, {k: v for k, v in answer.json.items() if k not in ("id", "created")}

    app, plain = make_app(), json.dumps(body).encode()
    assert told(call(app, gzip.compress(plain), path=path, headers=GZIP)) == told(call(app, plain, path=path))


@pytest.mark.parametrize("name", ["gzip", "GZIP", " x-gzip ", "gzip, identity", "identity, gzip"])
def test_gzip_is_taken_however_it_is_spelled(name: str) -> None:
    assert call(make_app(), WHOLE, headers=[(b"content-encoding", name.encode())]).status == 200


@pytest.mark.parametrize("name", ["", "identity", "identity, IDENTITY"])
def test_no_encoding_is_none(name: str) -> None:
    assert call(make_app(), chat(), headers=[(b"content-encoding", name.encode())]).status == 200


@pytest.mark.parametrize(
    "fields", [["br"], ["deflate"], ["zstd"], ["gzip, gzip"], ["gzip", "gzip"], ["br, gzip"], ["*"]]
)
def test_any_other_encoding_is_refused_before_it_is_read_and_told_what_is_taken(fields: list[str]) -> None:
    async def ask() -> Answer:
        sent = [(b"content-encoding", field.encode()) for field in fields]
        exchange = begin(make_app(), [b"x" * 10], headers=sent)

        async def receive() -> Any:
            raise AssertionError("the body was read")

        exchange.receive = receive  # type: ignore[method-assign]
        return await exchange.ended()

    answer = run(ask())
    assert (answer.status, answer.error["code"]) == (415, "unsupported_content_encoding")
    assert ", ".join(fields) in answer.error["message"]
    assert answer.headers["accept-encoding"] == "gzip"


# -- limits ------------------------------------------------------------------------------------------------------------


def spaces(size: int) -> bytes:
    """A good body of this size."""
    return good() + b" " * (size - len(good()))


def test_the_limit_is_for_what_is_decoded() -> None:
    app = make_app(max_body_bytes=LIMIT)
    assert call(app, gzip.compress(spaces(LIMIT)), headers=GZIP).status == 200
    answer = call(app, gzip.compress(spaces(LIMIT + 1)), headers=GZIP)
    assert (answer.status, answer.error["code"], answer.error["limit"]) == (413, "body_too_large", LIMIT)


@pytest.mark.parametrize("split", [1, 100])
def test_a_bomb_is_refused_after_little_of_it(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte behind a megabyte. Whatever has been decoded was reserved before it was kept."""
    most: list[int] = []
    memory: Callable[..., None] = BodyMemory.take

    def take(self: BodyMemory, amount: int, group: str, *, small: bool) -> None:
        memory(self, amount, group, small=small)
        most.append(self.taken.total())

    monkeypatch.setattr(BodyMemory, "take", take)
    encoder = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(encoder.compress(bytes(2**20)) for _ in range(200)) + encoder.flush()
    assert len(bomb) < LIMIT
    parts = [bomb[at : at + len(bomb) // split + 1] for at in range(0, len(bomb), len(bomb) // split + 1)]
    answer = call(make_app(max_body_bytes=LIMIT), parts, headers=GZIP)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert max(most) <= LIMIT


def test_decoded_bytes_take_room_and_give_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memories: list[BodyMemory] = []
    monkeypatch.setattr(bodies, "BodyMemory", lambda size: memories.append(BodyMemory(size)) or memories[-1])
    taken: list[int] = []
    prepare = FakeEngine.prepare

    async def noted(self: FakeEngine, request: Any) -> Any:
        taken.append(memories[0].taken.total())
        return await prepare(self, request)

    monkeypatch.setattr(FakeEngine, "prepare", noted)
    app = make_app(max_body_bytes=LIMIT)
    assert call(app, gzip.compress(spaces(200_000)), headers=GZIP).status == 200
    assert taken == [200_000]
    assert call(app, WHOLE[:-1], headers=GZIP).status == 400
    assert not memories[0].taken


def test_others_are_served_while_a_body_is_decoded() -> None:
    """Between two parts, everything else that waits has its turn."""

    class Body:
        headers = Headers({"content-encoding": "gzip"})

        def __init__(self, data: bytes) -> None:
            self._data = data

        async def receive(self) -> Any:
            return {"type": "http.request", "body": self._data, "more_body": False}

    async def read() -> int:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        made = Bodies(ServerSettings())
        counting = asyncio.ensure_future(count())
        request: Any = Body(gzip.compress(bytes(40 * STEP)))
        async with made.of(request, "", lambda raw, _: len(raw)) as checked:
            assert await checked("id") == 40 * STEP
        counting.cancel()
        made.close()
        return turns

    assert run(read()) >= 39


def test_over_a_socket_in_chunks() -> None:
    data = gzip.compress(good(user="u" * 10**5))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(data[at : at + 50]), data[at : at + 50]) for at in range(0, len(data), 50))
    with serving(make_app()) as running, running.client() as client:
        client.send(post(b"", "transfer-encoding: chunked", "content-encoding: gzip") + chunks + b"0\r\n\r\n")
        reply = client.reply()
        assert reply
        assert (reply.status, reply.code) == (200, None)

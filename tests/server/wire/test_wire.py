"""What one client sends on raw sockets: it is refused by name, nobody else waits for it, and it does not stay.

Against the server's own protocol on a real socket, on both event loops. Nothing here has a key: all of it holds before
one is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import make_app
from openai import OpenAI
from wire_client import LIVE, PATIENCE, Wire, good, post, serving, until

from server.wire import protocol

HEAD = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n"
FIELD = b"x-a: " + b"a" * 1000 + b"\r\n"
CHUNKED = post(b"", "transfer-encoding: chunked")


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """A server with little patience."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    with serving(make_app(body_seconds=2), loop=request.param, body_seconds=2, send_seconds=2) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every case the server answers, and none of the case's connections is left."""
    yield
    if "wire" in request.fixturenames:
        wire: Wire = request.getfixturevalue("wire")
        with wire.client() as client:
            client.send(LIVE)
            assert client.reply().status == 200  # type: ignore[union-attr]
        until(lambda: len(wire.connections) == 0)


# -- heads -----------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, bytes, int, str]] = [
    # name, what is sent, status, code
    ("a field without end", HEAD + b"x-a: " + b"a" * 10**6, 431, "head_too_large"),
    ("a name without end", HEAD + b"a" * 10**6, 431, "head_too_large"),
    ("fields without end", HEAD + FIELD * 99 + b"\r\n", 431, "head_too_large"),
    ("101 fields", HEAD + b"x-a: 1\r\n" * 100 + b"\r\n", 431, "head_too_large"),
    ("101 fields, not ended", HEAD + b"x-a: 1\r\n" * 101, 431, "head_too_large"),
    ("a head over the limit by a little", HEAD + FIELD * 66 + b"\r\n", 431, "head_too_large"),
    ("a long path", b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 414, "target_too_long"),
    ("a long query", b"GET /v1/models?" + b"a" * 10**6, 414, "target_too_long"),
    ("a method without end", b"G" * 10**6, 400, "invalid_http"),
    ("line ends without end", b"\r\n" * 10**5, 431, "head_too_large"),
    ("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http"),
    ("two lengths", post(b"{}", "content-length: 2", "content-length: 3"), 400, "invalid_http"),
    ("length and chunks", post(b"0\r\n\r\n", "content-length: 5", "transfer-encoding: chunked"), 400, "invalid_http"),
    ("not a chunk", CHUNKED + b"zz\r\n", 400, "invalid_http"),
    ("a trailer without end", CHUNKED + b"2\r\n{}\r\n0\r\nx-a: " + b"a" * 10**6, 431, "head_too_large"),
    ("trailers without end", CHUNKED + b"2\r\n{}\r\n0\r\n" + FIELD * 1000, 431, "head_too_large"),
    ("101 trailers", CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x-a: 1\r\n" * 102, 431, "head_too_large"),
    ("an extension of a chunk without end", CHUNKED + b"2;" + b"a" * 10**6, 431, "head_too_large"),
    ("a body in single bytes", CHUNKED + b"1\r\n \r\n" * 5000, 400, "pieces_too_small"),
    ("a word at a time, without end", CHUNKED + b"5\r\nhello\r\n" * 10_000, 400, "pieces_too_small"),
    ("CONNECT", b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n", 400, "invalid_http"),
]


@pytest.mark.parametrize(("data", "status", "code"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_is_over_a_limit_is_refused_by_name_and_the_connection_ends(
    wire: Wire, data: bytes, status: int, code: str
) -> None:
    with wire.client() as client:
        client.send(data)
        reply = client.reply()
        assert reply
        assert (reply.status, reply.code) == (status, code)
        assert reply.headers["connection"] == "close"
        assert client.closed()


TAKEN: list[tuple[str, bytes, int]] = [
    ("a head to the limit", HEAD + b"x-a: " + b"a" * 60_000 + b"\r\n\r\n", 200),
    ("100 fields", HEAD + b"x-a: 1\r\n" * 99 + b"\r\n", 200),
    ("a path to the limit", b"GET /" + b"a" * 8191 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
    ("an upgrade", HEAD + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n", 200),
    ("an upgrade and a body", post(good(), "connection: upgrade, http2-settings", "upgrade: h2c"), 200),
    ("a word at a time", CHUNKED + b"1\r\n \r\n" * 4000 + b"%x\r\n" % len(good()) + good() + b"\r\n0\r\n\r\n", 200),
    ("a trailer", CHUNKED + b"%x\r\n" % len(good()) + good() + b"\r\n0\r\nx-request-id: of-the-trailer\r\n\r\n", 200),
]


@pytest.mark.parametrize(("data", "status"), [c[1:] for c in TAKEN], ids=[c[0] for c in TAKEN])
def test_what_is_within_the_limits_is_answered(wire: Wire, data: bytes, status: int) -> None:
    with wire.client() as client:
        client.send(data)
        reply = client.reply()
        assert reply
        assert reply.status == status
        assert reply.headers["x-request-id"] != "of-the-trailer"


def test_a_wish_to_close_beside_one_for_another_protocol_is_kept(wire: Wire) -> None:
    with wire.client() as client:
        client.send(post(good(), "connection: Close, Upgrade", "upgrade: h2c") + LIVE)
        reply = client.reply()
        assert reply
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert client.reply() is None


WISH = HEAD + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
WISHES = [
    # several requests in one packet, the statuses of their answers
    ("two heads", WISH + b"\r\n" + WISH + b"\r\n", [200, 200]),
    ("twelve heads", (WISH + b"\r\n") * 12, [200] * 12),
    ("a body before a head", post(good(), "connection: upgrade", "upgrade: h2c") + WISH + b"\r\n" + LIVE, [200] * 3),
    ("no HTTP behind", WISH + b"\r\n" + WISH + b"\r\nnonsense\r\n\r\n", [200, 200, 400]),
    ("too long a head behind", WISH + b"\r\n" + WISH + b"x-a: 1\r\n" * 100 + b"\r\n", [200, 431]),
    ("too long a target behind", WISH + b"\r\n" + b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", [200, 414]),
    ("too many", (WISH + b"\r\n") * 40, [200] * 17 + [400]),
]


@pytest.mark.parametrize(("data", "statuses"), [c[1:] for c in WISHES], ids=[c[0] for c in WISHES])
def test_wishes_for_another_protocol_in_one_packet(wire: Wire, data: bytes, statuses: list[int]) -> None:
    with wire.client() as client:
        client.send(data)
        replies = [client.reply() for _ in statuses]
        assert [reply and reply.status for reply in replies] == statuses


def test_a_field_of_a_trailer_joins_no_head(wire: Wire) -> None:
    """Those were checked before: a field that comes after them must not be seen by what runs later."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with serving(app) as running, running.client() as client:
        client.send(CHUNKED + b"0\r\nauthorization: Bearer x\r\nx-b: 2\r\n\r\n")
        assert client.reply()
        client.send(LIVE)
        assert client.reply()
    assert b"authorization" not in dict(seen)
    assert b"x-b" not in dict(seen)
    assert b"host" in dict(seen)


# -- order -----------------------------------------------------------------------------------------------------------


def test_two_requests_sent_at_once_are_answered_in_order(wire: Wire) -> None:
    with wire.client() as client:
        client.send(post(good(seed=1)) + LIVE)
        first, second = client.reply(), client.reply()
        assert first
        assert second
        assert b"chat.completion" in first.body
        assert second.body == b'{"status":"live"}'


def test_what_is_wrong_is_answered_after_the_requests_before_it(wire: Wire) -> None:
    """Never into the middle of another answer."""
    with wire.client() as client:
        client.send(post(good()) + LIVE + b"nonsense\r\n\r\n")
        replies = [client.reply() for _ in range(3)]
        assert [reply and reply.status for reply in replies] == [200, 200, 400]
        assert client.closed()


def test_requests_ahead_of_an_answer_are_bounded() -> None:
    """Each costs memory before it is looked at; a read of a socket can hold thousands."""
    asked = threading.Semaphore(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.release()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with serving(app) as running, running.client() as client:
        client.send(LIVE * 5000)
        replies = []
        while reply := client.reply():
            replies.append(reply.status)
    assert replies == [200] * (protocol.MAX_PIPELINED + 1) + [400]


def test_a_body_that_goes_wrong_ends_its_request(wire: Wire) -> None:
    """What reads it must not wait until its time is over."""
    with serving(make_app(body_seconds=1000), body_seconds=1000) as running, running.client() as client:
        client.send(CHUNKED + b"5\r\n{")
        client.send(b"nonsense\r\n")
        reply = client.reply()
        assert reply
        assert reply.code == "invalid_http"
        assert client.closed()
        until(lambda: len(running.connections) == 0)


def test_who_leaves_ends_what_runs_for_it_though_more_was_asked_for_meanwhile() -> None:
    """Else a model would go on for nobody."""
    begun, told = threading.Event(), threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        told.set()

    with serving(app) as running:
        with running.client() as client:
            client.send(LIVE + LIVE)
            assert begun.wait(PATIENCE)
        assert told.wait(PATIENCE)


# -- connections that go nowhere -------------------------------------------------------------------------------------

PARKED: list[tuple[str, bytes, int | None]] = [
    # name, what is sent before silence, the status of an answer that comes first
    ("nothing", b"", None),
    ("line ends", b"\r\n\r\n", None),
    ("half a head", HEAD, None),
    ("half a body", post(good(), "content-length: 5000"), 408),
    ("a request", LIVE, 200),
    ("a line end after an answer", LIVE + b"\r\n", 200),
    ("half a head after an answer", LIVE + HEAD, 200),
    ("a byte of a body after an answer", post(b"{", "content-length: 999999999"), 413),
    ("a body that nobody reads", post(b"{", "content-length: 5000", path="/health/live"), 405),
]


@pytest.mark.parametrize(("data", "status"), [c[1:] for c in PARKED], ids=[c[0] for c in PARKED])
def test_a_connection_that_says_no_more_is_closed(wire: Wire, data: bytes, status: int | None) -> None:
    with wire.client() as client:
        client.send(data)
        if status:
            reply = client.reply()
            assert reply
            assert reply.status == status
            time.sleep(0.2)
            client.send(b"\r\n" if data == LIVE + b"\r\n" else b"")
        assert client.closed()


def test_bytes_that_are_no_request_do_not_keep_a_connection(wire: Wire) -> None:
    """A line end every half second, for as long as it is taken."""
    with wire.client() as client:
        client.send(LIVE)
        assert client.reply()
        client.socket.settimeout(0.5)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            client.send(b"\r\n")
            if client.closed():
                return
    pytest.fail("a connection lives on line ends")


@pytest.mark.parametrize("length", [40_000, 3_000_000], ids=["little", "much"])
@pytest.mark.parametrize("loop", ["auto", "asyncio"])
def test_an_answer_that_nobody_reads_is_given_up(loop: str, length: int) -> None:
    """Also one that fits into the server's own buffer, after which the connection would wait for ever."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"content-length", b"%d" % length), (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"x" * length})

    with serving(app, loop=loop, send_seconds=1, send_buffer=2048) as running, socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        silent.connect(("127.0.0.1", running.port))
        silent.sendall(LIVE)
        until(lambda: len(running.connections) == 1)
        until(lambda: len(running.connections) == 0)


@pytest.mark.parametrize("closing", [False, True], ids=["kept", "closed"])
@pytest.mark.parametrize("loop", ["auto", "asyncio"])
def test_a_client_that_reads_slowly_has_all_of_it(loop: str, closing: bool) -> None:
    """It takes much longer than `send_seconds`, and never leaves anything unread for that long."""
    length = 12 * 10**6

    async def app(scope: Any, receive: Any, send: Any) -> None:
        fields = [(b"content-length", b"%d" % length), *([(b"connection", b"close")] if closing else [])]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": b"x" * length})

    with serving(app, loop=loop, send_seconds=1.5) as running, running.client() as client:
        client.send(LIVE)
        taken = 0
        while taken < length and (data := client.socket.recv(2**18)):
            taken += len(data)
            time.sleep(0.06)
    assert taken >= length


@pytest.mark.parametrize("early", [b"GET /v", b"\r\n", HEAD], ids=["a line", "a line end", "a head"])
def test_what_comes_before_an_answer_has_ended_does_not_cut_it(early: bytes) -> None:
    """The patience for the next head begins once there is nothing to answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        fields = [(b"content-length", b"10")]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        for left in range(9, -1, -1):
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b"x", "more_body": left > 0})

    with serving(app, body_seconds=0.4) as running, running.client() as client:
        client.send(LIVE + early)
        assert client.reply().body == b"x" * 10  # type: ignore[union-attr]
        began = time.monotonic()
        assert client.closed()
        assert time.monotonic() - began < PATIENCE / 2


def test_who_sends_a_body_before_it_reads_finds_its_refusal(wire: Wire) -> None:
    """Over a slow line a body arrives for longer than a connection may idle."""
    with serving(make_app(max_body_bytes=2000)) as running, running.client() as client:
        client.send(post(b"", "content-length: 2300"))
        for _ in range(23):
            time.sleep(0.1)
            client.socket.sendall(b" " * 100)
        assert client.reply().status == 413  # type: ignore[union-attr]
        client.send(LIVE)
        assert client.reply().status == 200  # type: ignore[union-attr]
        began = time.monotonic()
        assert client.closed()
        assert time.monotonic() - began < PATIENCE / 2


# -- clients that mean well ------------------------------------------------------------------------------------------


def test_the_official_client_keeps_its_connection(wire: Wire) -> None:
    with OpenAI(base_url=f"http://127.0.0.1:{wire.port}/v1", api_key="x", max_retries=0) as client:
        for stream in (False, True, False):
            messages: Any = [{"role": "user", "content": "long " * 20_000 if stream else "Hi"}]
            with contextlib.suppress(Exception) if stream else contextlib.nullcontext():
                client.chat.completions.create(model="fake", messages=messages, stream=stream)
            assert client.models.list().data[0].id == "fake"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("options", [["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"], ["--http2"]])
def test_curl_is_answered(wire: Wire, options: list[str]) -> None:
    url = f"http://127.0.0.1:{wire.port}/v1/chat/completions"
    json_type = ["-H", "Content-Type: application/json"]
    done = subprocess.run(
        ["curl", "-sS", "-m", "10", *options, *json_type, "--data-binary", "@-", url],
        input=good(user="u" * 10**6),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert b'"object":"chat.completion"' in done.stdout, done


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(wire: Wire) -> None:
    with wire.client() as client:
        client.send(post(b"", "expect: 100-continue", f"content-length: {len(good())}"))
        told = client.reply()
        assert told
        assert told.status == 100
        client.send(good())
        assert client.reply().status == 200  # type: ignore[union-attr]

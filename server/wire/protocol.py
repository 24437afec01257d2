"""uvicorn's HTTP protocol with limits: on heads, pipelines, waiting times and connections.

Everything here applies before a request is understood: no path and no key is known. httptools parses on every system;
uvicorn's other protocol (h11) is not used.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server import logs
from server.errors import error_body
from server.json_text import to_json
from server.wire.connections import Connections

__all__ = ["REFUSALS", "bounded_protocol"]

MAX_TARGET: Final = 8 * 2**10
"""Bytes of a path with its query string."""
MAX_HEAD: Final = 64 * 2**10
"""Bytes of a head: request line and fields. Also of other bytes that belong to no body: a trailer, line ends before a
request."""
MAX_FIELDS: Final = 100
"""Header fields of a head, or of a trailer."""
MAX_PIPELINED: Final = 16
"""Requests that a client may send before the first of them is answered."""
MAX_PIECES: Final = 4096
"""Pieces in which a body may arrive, plus one for each 128 bytes. Each piece costs the event loop the same, however
small it is; this many take about 4 ms. Some clients send a body as their encoder writes it, a word at a time."""
_SLICE: Final = 16 * 2**10
"""Bytes that are parsed before the limits are checked again."""
_PART: Final = 10
"""Within each `send_seconds` a client must read at least one part in this many of what waits for it."""
_LINGER: Final = 2.0
"""Seconds that a client has to read why it was refused. What it sends meanwhile is dropped."""


class _Refused(Exception):
    """The bytes of a client exceed a limit or are not HTTP. Nothing more is read from it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


_NOT_HTTP: Final = (400, "invalid_http", "What was sent is not an HTTP/1.1 request.")
_NOT_HTTP_1: Final = (
    505,
    "http_version_not_supported",
    "This server speaks HTTP/1.1, and not HTTP/2 without TLS (h2c).",
)
_LONG_HEAD: Final = (431, "head_too_large", f"The head of a request, or its trailer, may have {MAX_HEAD} bytes.")
_MANY_FIELDS: Final = (431, "head_too_large", f"The head of a request, or its trailer, may have {MAX_FIELDS} fields.")
_LONG_TARGET: Final = (414, "target_too_long", f"A path with its query may have at most {MAX_TARGET} bytes.")
_MANY_REQUESTS: Final = (
    400,
    "too_many_pipelined",
    f"At most {MAX_PIPELINED} requests may be sent on a connection ahead of the answer to the one before.",
)
_SMALL_PIECES: Final = (400, "pieces_too_small", "The body comes in pieces of a few bytes; send larger ones.")
_FULL: Final = (503, "connections_full", "The server has as many connections as it may have, all at work; try later.")

REFUSALS: Final = (
    _NOT_HTTP,
    _MANY_REQUESTS,
    _SMALL_PIECES,
    _LONG_TARGET,
    _LONG_HEAD,
    _MANY_FIELDS,
    _FULL,
    _NOT_HTTP_1,
)
"""Status, code and message of every refusal before there is a request."""


class _Transport:
    """A transport that tells the protocol of `close`: the client may never read what still has to be sent."""

    def __init__(self, transport: asyncio.Transport, protocol: _BoundedProtocol) -> None:
        self._transport = transport
        self._protocol: _BoundedProtocol | None = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._transport.close()
        if self._protocol:
            self._protocol.closing()

    def lost(self) -> None:
        """Drop the reference to the protocol, so that neither waits for the garbage collector."""
        self._protocol = None


class _BoundedProtocol(HttpToolsProtocol):
    """Refuses what exceeds a limit, and closes connections that make no progress; their requests see a disconnect.

    A refusal is answered after the requests before it; then the connection ends.
    """

    head_seconds: float
    send_seconds: float
    retry_after: int
    open_connections: Connections

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._unanswered: deque[RequestResponseCycle] = deque()  # requests whose head is complete, oldest first
        self._deaf = False  # incoming bytes are dropped
        self._refusal: _Refused | None = None
        self._still = 0  # bytes since a request last made progress
        self._head = self._fields = self._pieces = self._body = 0
        self._in_head = True

    # -- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self._give_up_in(self.head_seconds, "head")
        if not self.open_connections.admit(self):
            self._deaf = True
            self.transport.write(self._answer(_Refused(*_FULL)))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deaf = True
        self.open_connections.drop(self)
        super().connection_lost(exc)
        for cycle in self._unanswered:  # uvicorn tells only the last one, and an earlier one may be running
            cycle.disconnected = True
            cycle.message_event.set()
        self._unset_keepalive_if_required()
        for what in list(self._timers):
            self._go_on(what)
        self.transport.lost()  # type: ignore[attr-defined]

    def give_up(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def closing(self) -> None:
        """Note that the transport closes: it must do so even if its client reads nothing more."""
        self._expect_reading("close")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading("unread")

    def resume_writing(self) -> None:
        self._go_on("unread")
        super().resume_writing()

    # -- what arrives ------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse bytes. Unlike in uvicorn, a request stops the timer of an idle connection, not any byte."""
        for start in range(0, len(data), _SLICE):
            if self._deaf:
                return
            piece = data[start : start + _SLICE]
            self._still += len(piece)
            try:
                self._parse(piece)
            except httptools.HttpParserError as error:
                cause = error.__context__
                later = self.parser.get_http_version() >= "2"  # also HTTP/2's own first line, `PRI * HTTP/2.0`
                fault = _Refused(*(_NOT_HTTP_1 if later else _NOT_HTTP))
                self._refuse(cause if isinstance(cause, _Refused) else fault)
            else:
                if self._still > MAX_HEAD:
                    self._refuse(_Refused(*_LONG_HEAD))

    def _parse(self, data: bytes) -> None:
        """Parse bytes, which may hold several requests that wish for another protocol."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
            # Not in the handler: an error there would have the wish as its context, and not the limit it exceeds.
            self._stay()

    def _stay(self) -> None:
        """Parse the head of a request again without its `Upgrade`, which a server may ignore.

        The parser would take the body for the other protocol. Java's client and `curl --http2` send an HTTP/1.1 body.
        """
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        wishes = [value.lower() for name, value in self.headers if name == b"connection"]
        lines += [name + b": " + value for name, value in self.headers if name not in (b"upgrade", b"connection")]
        if b"close" in [token.strip() for wish in wishes for token in wish.split(b",")]:
            lines.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._in_head = True
        self._still = self._head = self._fields = self._pieces = self._body = 0
        if "head" not in self._timers and not self._unanswered:  # reading may pause until all are answered
            self._give_up_in(self.head_seconds, "head")

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_TARGET:
            raise _Refused(*_LONG_TARGET)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise _Refused(*_MANY_FIELDS)
        self._head += len(name) + len(value) + 4
        if self._head > MAX_HEAD:
            raise _Refused(*_LONG_HEAD)
        if self._in_head:  # a trailer's field has no meaning here, and must not join the fields that were checked
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._head + len(self.url) > MAX_HEAD:
            raise _Refused(*_LONG_HEAD)
        if self.parser.get_http_version() >= "2":
            raise _Refused(*_NOT_HTTP_1)
        if self.parser.get_method() == b"CONNECT" or any(b"\n" in value for _, value in self.headers):
            raise _Refused(*_NOT_HTTP)
        if self.parser.should_upgrade():
            return  # `_stay` parses it again without the upgrade
        if len(self._unanswered) > MAX_PIPELINED:
            raise _Refused(*_MANY_REQUESTS)
        if self.url[:1] != b"/":  # `GET http://host/path`: uvicorn keeps only the path, and the host must be checked
            authority = self.url.partition(b"://")[2].partition(b"/")[0].partition(b"?")[0]
            self.scope["state"]["target_authority"] = authority.decode("latin-1") if b"://" in self.url else None
        super().on_headers_complete()
        self._unset_keepalive_if_required()
        self._go_on("head")
        self._unanswered.append(self.cycle)
        self._in_head = False
        self._still = self._head = self._fields = 0
        self._note()

    def on_body(self, body: bytes) -> None:
        self._still = 0
        self._pieces += 1
        self._body += len(body)
        if self._pieces > MAX_PIECES + self._body // 128:
            raise _Refused(*_SMALL_PIECES)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._still = 0
        super().on_message_complete()
        self._note()
        if "rest" in self._timers:
            self._go_on("rest")
            self._wait_for_the_next()

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        super().on_response_complete()
        self._note()
        if self._deaf and not self._unanswered:
            self._end()
        elif self.timeout_keep_alive_task is not None and (self.cycle.more_body or self._in_head):
            # More is coming: the rest of a refused body, whose client may not read the answer before it has sent
            # everything, or of the next head.
            self._unset_keepalive_if_required()
            self._give_up_in(self.head_seconds, "rest" if self.cycle.more_body else "head")

    def _wait_for_the_next(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _note(self) -> None:
        """Tell `Connections` what this connection waits for."""
        if not self._unanswered:
            self.open_connections.note(self, "idle")
        elif len(self._unanswered) == 1 and self.cycle.more_body:
            self.open_connections.note(self, "body")
        else:
            self.open_connections.note(self, "no")

    # -- the end -----------------------------------------------------------------------------------------------------

    def _refuse(self, refused: _Refused) -> None:
        """Answer a refusal after the requests before it. A request whose body is refused sees a disconnect."""
        self._deaf = True
        self._refusal = refused
        self._go_on("head")
        self.flow.resume_reading()  # to notice the end of the connection
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
            self._unanswered.pop()
            if self.pipeline and self.pipeline[0][0] is cycle:
                self.pipeline.popleft()
        if not self._unanswered:
            self._end()

    def _end(self) -> None:
        if self.transport.is_closing():
            return
        assert self._refusal
        self._unset_keepalive_if_required()
        self.transport.write(self._answer(self._refusal))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._give_up_in(_LINGER, "linger")

    def _answer(self, refused: _Refused) -> bytes:
        self.open_connections.refusals[refused.status, refused.code] += 1
        return _answer(refused, self.retry_after)

    def _expect_reading(self, what: str) -> None:
        """Close the connection of a client that does not read what waits for it. A slow reader has time."""
        waits = self.transport.get_write_buffer_size()
        self._look_later(what, waits, waits // _PART + 1)

    def _look_later(self, what: str, waits: int, least: int) -> None:
        self._go_on(what)
        self._timers[what] = self.loop.call_later(self.send_seconds, self._look, what, waits, least)

    def _look(self, what: str, waited: int, least: int) -> None:
        waits = self.transport.get_write_buffer_size()
        if waited - waits < least:
            self.give_up()
        else:
            self._look_later(what, waits, least)

    def _give_up_in(self, seconds: float, what: str) -> None:
        self._go_on(what)
        self._timers[what] = self.loop.call_later(seconds, self.give_up)

    def _go_on(self, what: str) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()


def _answer(refused: _Refused, retry_after: int) -> bytes:
    """Build the answer to a refusal before there is a request, and log it."""
    request_id = f"req-{secrets.token_hex(12)}"
    kind = "server_overloaded" if refused.status == 503 else "invalid_request_error"
    body = to_json(error_body(refused.message, kind, None, refused.code)).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": request_id,
        "x-content-type-options": "nosniff",
        **({"retry-after": str(retry_after)} if refused.status == 503 else {}),
    }
    logs.access(request_id=request_id, status=refused.status, refused=refused.code)
    lines = [f"HTTP/1.1 {refused.status} {HTTPStatus(refused.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def bounded_protocol(
    connections: Connections, *, head_seconds: float, send_seconds: float, retry_after: int
) -> type[HttpToolsProtocol]:
    """Build the protocol class with these limits, as uvicorn expects it."""
    limits = {
        "open_connections": connections,
        "head_seconds": head_seconds,
        "send_seconds": send_seconds,
        "retry_after": retry_after,
    }
    return type("BoundedProtocol", (_BoundedProtocol,), limits)

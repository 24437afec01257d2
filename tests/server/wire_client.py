"""An application behind the server's own protocol on a real socket, and clients that send whatever bytes they like."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fakes import chat

from engine import Registry
from server.run import Server, configured
from server.settings import ServerSettings
from server.wire.connections import Connections

PATIENCE = 60.0
"""Seconds after which a client of these tests gives up; nothing is measured by it."""
LIVE = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"


@dataclass
class Wire:
    """A running server. `connections` is its own account of them."""

    port: int
    connections: Connections

    def client(self) -> Client:
        return Client(socket.create_connection(("127.0.0.1", self.port), PATIENCE))


@contextlib.contextmanager
def serving(
    app: Any, *, loop: str = "auto", connections: int = 1000, send_buffer: int = 0, **settings: Any
) -> Iterator[Wire]:
    """Serve on a thread of this process until the block ends. Without a lifespan: an application may be a function."""
    room = Connections(connections)
    config = configured(app, ServerSettings(shutdown_seconds=0, **settings), room)
    config.loop = loop  # type: ignore[assignment]
    config.lifespan = "off"
    config.timeout_keep_alive = settings.get("idle_seconds", 1)
    config.timeout_graceful_shutdown = 1
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Server(config, Registry([]), 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Wire(listener.getsockname()[1], room)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """The code of an error, whose shape is checked; None for anything else."""
        if self.status < 400:
            return None
        error = json.loads(self.body)["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        assert self.headers["x-request-id"]
        return str(error["code"])


@dataclass
class Client:
    """One connection."""

    socket: socket.socket
    _read: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send all of it, or as much as the server takes before it closes."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def reply(self) -> Reply | None:
        """The next answer; None if the connection ends instead."""
        while b"\r\n\r\n" not in self._read:
            if not self._more():
                assert not self._read, bytes(self._read[:200])
                return None
        head, _, rest = bytes(self._read).partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        status = int(first.split()[1])
        size = 0 if status < 200 else int(headers["content-length"])
        self._read = bytearray(rest)
        while len(self._read) < size:
            assert self._more(), "an answer ended in its middle"
        body = bytes(self._read[:size])
        del self._read[:size]
        return Reply(status, headers, body)

    def closed(self) -> bool:
        """Wait until the server closes; False if it does not."""
        try:
            while self._more():
                pass
        except TimeoutError:
            return False
        return True

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            return False
        self._read += data
        return bool(data)


def post(body: bytes, *fields: str, path: str = "/v1/chat/completions") -> bytes:
    """A request with a body. Fields beside its length, which is announced unless another is."""
    length = [] if any("length" in f or "transfer" in f for f in fields) else [f"content-length: {len(body)}"]
    head = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *length, *fields, "", ""]
    return "\r\n".join(head).encode() + body


def good(**fields: Any) -> bytes:
    return json.dumps(chat(**fields)).encode()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

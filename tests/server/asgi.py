"""An ASGI client without sockets: sends what a test says, records what comes back, and checks the protocol itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
BOUND = 60.0
"""Seconds that anything without a real model may take."""
CHAT = "/v1/chat/completions"


def run(work: Coroutine[Any, Any, Any], bound: float = 120.0) -> Any:
    """Run to the end, never longer than `bound` seconds."""

    async def bounded() -> Any:
        async with asyncio.timeout(bound):  # not wait_for: it would add a task, and tests count them
            return await work

    return asyncio.run(bounded())


@dataclass
class Exchange:
    """One request under way. `disconnect()` is the client going away."""

    body: Iterable[bytes]
    messages: list[Message] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    faults: list[str] = field(default_factory=list)
    """Breaches of the protocol, also of tasks that nobody awaits."""

    def __post_init__(self) -> None:
        parts = list(self.body) or [b""]
        self._pending = [
            {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)
        ]
        self._gone = asyncio.Event()
        self._news = asyncio.Event()
        self.on_send: Callable[[Message], Awaitable[None]] | None = None

    async def receive(self) -> Message:
        if self._pending:
            return self._pending.pop(0)
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        fault = self._fault(message)
        if fault:
            self.faults.append(fault)
            raise AssertionError(fault)
        if self.on_send:
            await self.on_send(message)
        self.messages.append(message)
        self._news.set()

    def _fault(self, message: Message) -> str:
        if message["type"] == "http.response.start":
            return "two responses to one request" if self.messages else ""
        if not self.messages:
            return "a body before its status"
        ended = len(self.messages) > 1 and not self.messages[-1].get("more_body")
        return "a body after the end" if ended else ""

    def disconnect(self) -> None:
        self._gone.set()

    async def until(self, condition: Callable[[], bool], bound: float = BOUND) -> None:
        """Wait until something is true; looked at after every message and every few milliseconds."""

        async def wait() -> None:
            while not condition():
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), 0.005)

        await asyncio.wait_for(wait(), bound)

    async def ended(self, bound: float = BOUND) -> Answer:
        assert self.task
        await asyncio.wait_for(self.task, bound)
        return self.answer

    @property
    def received(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages[1:])

    @property
    def answer(self) -> Answer:
        assert not self.faults, self.faults
        start = self.messages[0]
        assert not self.messages[-1].get("more_body", False), "the response was not ended"
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in start["headers"]}
        return Answer(start["status"], headers, self.received)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, after checking that it has the shape that errors have: Anthropic's adds two members."""
        assert self.headers["content-type"] == "application/json"
        assert set(self.json) == {"error"} or (self.json["type"], set(self.json) - {"type", "request_id"}) == (
            "error",
            {"error"},
        )
        error = self.json["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["type"], str)
        assert isinstance(error["code"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        assert "Traceback" not in error["message"]
        return dict(error)

    @property
    def events(self) -> list[Any]:
        """Data of the server-sent events; `[DONE]` as that string. Comments are left out."""
        text = self.body.decode("utf-8")
        assert text.endswith("\n\n")
        lines = text.split("\n")
        assert all(line == "" or line.startswith(("data: ", "event: ", ":")) for line in lines)
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


def begin(
    app: Any,
    body: bytes | Iterable[bytes] | dict[str, Any] | None = None,
    *,
    path: str = CHAT,
    method: str | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
    query: bytes = b"",
    hosts: Iterable[bytes] = (b"127.0.0.1",),
    http_version: str = "1.1",
) -> Exchange:
    """Start a request and return at once. A mapping is sent as JSON; an iterable of bytes, part by part."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    if isinstance(body, bytes):
        body = [body]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": http_version,
        "method": method or ("GET" if body is None else "POST"),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": [*((b"host", host) for host in hosts), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    exchange = Exchange(body or [])
    exchange.task = asyncio.ensure_future(app(scope, exchange.receive, exchange.send))
    return exchange


def call(app: Any, body: bytes | Iterable[bytes] | dict[str, Any] | None = None, **how: Any) -> Answer:
    """One whole exchange."""

    async def exchange() -> Answer:
        return await begin(app, body, **how).ended(5.0)

    answer: Answer = run(exchange(), 10.0)
    return answer

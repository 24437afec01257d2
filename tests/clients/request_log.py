"""ASGI middleware that writes down every request and what became of it, and takes in the scripts of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST = 4_000
"""Characters of an error that are kept."""


class RequestLog:
    """Writes a line of JSON for each request to `log`: try, method, path, fields of the body, status, error.

    `POST /scripted` reaches `take_script` and goes no further.
    """

    def __init__(self, app: ASGIApp, log: TextIO, take_script: Callable[[dict[str, Any]], None]) -> None:
        self._app = app
        self._log = log
        self._take_script = take_script
        self._try: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        chunks: list[bytes] = []

        async def received() -> Message:
            message = await receive()
            chunks.append(message.get("body", b""))
            return message

        if scope["path"] == "/scripted":
            while (await received()).get("more_body"):
                pass
            self._try = json.loads(b"".join(chunks))
            self._take_script(self._try)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        line = {"endpoint": self._try.get("endpoint"), "try": self._try.get("try")}
        line |= {"method": scope["method"], "path": scope["path"], "status": 0, "ignored": "", "error": ""}
        told = bytearray()

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                headers = {name.lower(): value for name, value in message["headers"]}
                line["ignored"] = headers.get(b"x-ignored-fields", b"").decode()
            elif len(told) < MOST and (line["status"] >= 400 or b'"error"' in message.get("body", b"")):
                told.extend(message["body"])
            await send(message)

        try:
            await self._app(scope, received, sent)
        finally:
            self._write(line, b"".join(chunks), told.decode(errors="replace")[:MOST])

    def _write(self, line: dict[str, Any], raw: bytes, error: str) -> None:
        try:
            body = json.loads(raw) if raw else {}
        except ValueError:
            body = {}
        line |= {"fields": sorted(body) if isinstance(body, dict) else [], "bytes": len(raw)}
        if line["status"] >= 400 or '"error":null' not in error.replace(" ", ""):
            line["error"] = error
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

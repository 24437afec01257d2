"""Sends requests to the application in this process: no socket, and the same checks, errors and bodies as over HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from starlette.types import ASGIApp, Message, Scope

from server.api.admission import Identity
from server.batch.lines import Answer

__all__ = ["post"]

_HEADERS: Final = ((b"host", b"127.0.0.1"), (b"content-type", b"application/json"))


async def post(app: ASGIApp, url: str, body: bytes, identity: Identity) -> Answer:
    """Send a request and return its answer. Its ids and its time are those of `identity`.

    Cancelling the call ends the request.
    """
    request_id = f"req-{identity.id}"
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*_HEADERS, (b"x-request-id", request_id.encode())],
        "client": None,
        "server": None,
        "state": {"identity": identity},
    }
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    started: list[Message] = []
    parts: list[bytes] = []

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            started.append(message)
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    [start] = started
    ignored = next((value.decode() for name, value in start["headers"] if name == b"x-ignored-fields"), "")
    return Answer(start["status"], request_id, json.loads(b"".join(parts)), ignored)

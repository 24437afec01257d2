"""Wraps every exchange: a request id, a line in the access log, and an answer to errors that nothing else has handled.

Knows no path and no key.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import Unavailable
from server import logs
from server.errors import ClientGone, error_response

__all__ = ["Envelope"]

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Envelope:
    """Pure ASGI: adds `x-request-id` to every response, logs the exchange, and answers unhandled errors.

    The id is the client's own if it is harmless, else a fresh one. Unhandled errors are answered here and not in a
    handler for `Exception`: starlette runs that one outside, where the answer would have no id, and raises again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        began, status = time.monotonic(), 0
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            return
        except asyncio.CancelledError:
            if not status:  # the server ends, and uvicorn would answer in plain text
                error = Unavailable("the server is stopping, and this request was not answered in time.")
                await error_response(error, scope)(scope, receive, send_with_id)
            raise
        except Exception as error:
            if status:
                raise  # too late for a status: the connection must break, or half an answer would look whole
            await error_response(error, scope)(scope, receive, send_with_id)
        finally:
            key = state.get("key")
            logs.access(
                request_id=request_id,
                method=scope["method"],
                path=scope["path"][:200],
                status=status or None,
                key=key.name if key else None,
                ms=round((time.monotonic() - began) * 1000),
                **state.get("told", {}),
            )

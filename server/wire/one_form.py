"""Brings requests into the one form that routes know: `GET` for `HEAD`, and paths without empty segments.

Knows no path. Stands before everything that looks at a path or a method, so that `/health/live/` is as open as
`/health/live`, and a `HEAD` is refused exactly where its `GET` is.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["OneForm", "plain_path"]

_BODY: Final = "http.response.body"


class OneForm:
    """Pure ASGI: answers `HEAD` as `GET` with its body left out, and `/v1//models/` as `/v1/models`.

    Such requests are answered and not redirected: clients follow a redirection of a POST without its body, and one to
    another address without its key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": plain_path(scope["path"])}
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == _BODY:
                if message.get("more_body", False):
                    return
                message = {"type": _BODY, "body": b"", "more_body": False}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


def plain_path(path: str) -> str:
    """Return a path without its empty segments, and so without a slash at its end: `/v1//models/` → `/v1/models`."""
    if not path.startswith("/"):  # `OPTIONS *`
        return path
    return "/" + "/".join(segment for segment in path.split("/") if segment)

"""Sends the page to browsers. It holds no data, so that nobody needs a key for it; what it asks for then needs one.

At `/` only those are meant who accept HTML: any other client gets there what it gets without a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import MethodNotAllowed, error_response
from server.page.files import PageFile

__all__ = ["Page", "accepts_html"]

_ALLOW: Final = ["GET", "HEAD", "OPTIONS"]


class Page:
    """Pure ASGI: answers `GET` of the page's own paths, and hands on all other requests.

    Stands before the check of keys and after that of hosts and origins, behind `OneForm`: `HEAD` comes as `GET`.
    """

    def __init__(self, app: ASGIApp, files: Mapping[str, PageFile]) -> None:
        self._app = app
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer(scope) if scope["type"] == "http" else None
        await (answer or self._app)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        file = self._files.get(scope["path"])
        if file is None:
            return None
        if scope["method"] == "OPTIONS" and "access-control-request-method" not in Headers(scope=scope):
            return Response(status_code=204, headers={"allow": ", ".join(_ALLOW)})
        if scope["path"] == "/":
            if scope["method"] != "GET" or not accepts_html(Headers(scope=scope).getlist("accept")):
                return None
            return Response(file.body, headers={**file.headers, "vary": "Accept"})
        if scope["method"] == "GET":
            return Response(file.body, headers=dict(file.headers))
        refused = f"{scope['path']} takes {', '.join(_ALLOW)}, not {scope['method'][:20]}."
        return error_response(MethodNotAllowed(refused, methods=_ALLOW), scope)


def accepts_html(accept: list[str]) -> bool:
    """Return whether an `Accept` header names HTML, as browsers do: `*/*` alone, which curl sends, does not."""
    for entry in ",".join(accept).split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        if kind == "text/html":
            return not any(parameter.replace(" ", "").rstrip("0.") == "q=" for parameter in parameters)
    return False

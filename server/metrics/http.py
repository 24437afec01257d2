"""Counts HTTP exchanges: by endpoint, method and status, and refusals by their code. Knows no body and no key."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics.counts import METHODS, OTHER, Counts
from server.wire.one_form import plain_path

__all__ = ["Counted", "Endpoints"]


class Endpoints:
    """The label of each path: the endpoint's route, with the names of its parameters in place of their values.

    Args:
        routes: every route, as `Paths` spells it.
        prefixes: those under which the same routes are served. A label has the last one.
    """

    def __init__(self, routes: Iterable[str], prefixes: tuple[str, ...]) -> None:
        self._exact: dict[str, str] = {}
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        for route in routes:
            prefix = next((one for one in sorted(prefixes, key=len, reverse=True) if route.startswith(f"{one}/")), None)
            label = route if prefix is None else prefixes[-1] + route.removeprefix(prefix)
            if "{" in route:
                self._patterns.append((re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(route)), re.DOTALL), label))
            else:
                self._exact[route] = label

    def label(self, path: str) -> str:
        """Return the endpoint of a path; `other` if there is none."""
        plain = plain_path(path)
        if (exact := self._exact.get(plain)) is not None:
            return exact
        return next((label for pattern, label in self._patterns if pattern.fullmatch(plain)), OTHER)


class Counted:
    """Pure ASGI: counts every exchange once, when it ends. To be the outermost, so that every answer passes it."""

    def __init__(self, app: ASGIApp, counts: Counts, endpoints: Endpoints) -> None:
        self._app = app
        self._counts = counts
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counts, status = self._counts, 0
        state = scope.setdefault("state", {})

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        counts.active += 1
        try:
            await self._app(scope, receive, send_counted)
        finally:
            counts.active -= 1
            method = scope["method"] if scope["method"] in METHODS else OTHER
            counts.requests[self._endpoints.label(scope["path"]), method, str(status or "none")] += 1
            if "error_code" in state:
                counts.refusals[status, state["error_code"]] += 1

"""Refuses requests from web pages of other origins: a browser lets any page send requests to this machine.

Only the head of a request is looked at. A page whose own name was made to resolve to this machine (DNS rebinding) has
that name in `Host`. A page that sends a request whose answer it cannot read has its `Origin`, its `Sec-Fetch-Site`, or
a content type that needs no preflight. Clients other than browsers send none of these.
"""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine import VerbatimError
from server.errors import BadHost, HostNotAllowed, OriginNotAllowed, UnsupportedMediaType, error_response
from server.hosts import Authority, covers, is_loopback, parse_authority, same_authority
from server.settings import ServerSettings

__all__ = ["JsonOnly", "NoForeignPages", "Preflights"]

_READING: Final = frozenset({"GET", "HEAD"})
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


class NoForeignPages:
    """Pure ASGI: refuses requests for other hosts' names, and requests from pages of other origins.

    Args:
        keys: whether every request needs a key, which a page cannot know.
        silent: paths that tell nothing about models or users. A load balancer may request them under any name, unless
            the server listens only to its own machine.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, *, keys: bool, silent: frozenset[str]) -> None:
        self._app = app
        self._origins = settings.cors_origins
        own = parse_authority(f"[{settings.host}]" if ":" in settings.host else settings.host)
        private = not keys and own is not None and is_loopback(own.name)
        if private or settings.hosts:
            self._hosts: tuple[str, ...] = (*settings.hosts, *([own.name] if own else []))
        else:
            self._hosts = ("*",)
        self._silent = frozenset() if private else silent
        self._why = (
            "this server answers to this machine's own names" if private else "this server does not answer to that name"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it, and no key would be checked
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http" and (fault := self._fault(scope)):
            await _refuse(fault, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _fault(self, scope: Scope) -> VerbatimError | None:
        try:
            host = _host(scope)
        except BadHost as error:
            return error
        if (
            host
            and scope["path"] not in self._silent
            and not (is_loopback(host.name) or covers(self._hosts, host.name))
        ):
            return HostNotAllowed(
                f"{self._why}, and not as {host.name[:200]}. If it is meant to be reached by this name, add it to "
                f"`hosts` under `server` in models.yaml: hosts: [{host.name[:200]}]; or start it with --allow-host."
            )
        return self._foreign(scope, host)

    def _foreign(self, scope: Scope, host: Authority | None) -> VerbatimError | None:
        """Return a refusal if a page sent this whose origin is not in `cors_origins`."""
        if "*" in self._origins:
            return None
        origins, site = _all(scope, b"origin"), _all(scope, b"sec-fetch-site")
        strangers = [origin for origin in origins if origin not in self._origins]
        if origins and not strangers:
            return None
        elsewhere = any(value.strip().lower() in ("cross-site", "same-site") for value in site)
        if not origins:
            # From another site only a followed link is allowed: the page with the link cannot read the answer.
            if not elsewhere or (scope["method"] in _READING and _followed(scope)):
                return None
            return OriginNotAllowed("a page of another site has sent this; such requests are not answered.")
        if host and not elsewhere and all(same_authority(origin, host) for origin in strangers):
            return None
        return OriginNotAllowed(
            f"a page of {strangers[0][:200]} may not use this server. If it is meant to, add its origin to "
            f"`cors_origins` under `server` in models.yaml: cors_origins: [{strangers[0][:200]!r}]."
        )


class Preflights(CORSMiddleware):
    """Starlette's answers to pages of other origins, none of them in plain text: JSON where one is refused."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        kept = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        if answer.status_code < 400:
            return Response(status_code=answer.status_code, headers=kept)
        method = request_headers["access-control-request-method"][:20]
        fault = OriginNotAllowed(f"a page may not send {method} here: {bytes(answer.body).decode()}.")
        refused = error_response(fault, {"path": ""})  # read by a browser, in any shape
        refused.headers.update(kept)
        return refused


class JsonOnly:
    """Pure ASGI: refuses bodies whose content type is not JSON.

    A page may send text, forms and bodies without a type to any server; before it sends JSON its browser asks for
    permission, with a preflight. Clients other than browsers may leave the type out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _SAFE and (fault := _not_json(scope)):
            await _refuse(fault, scope, receive, send)
            return
        await self._app(scope, receive, send)


def _not_json(scope: Scope) -> VerbatimError | None:
    given = [value.strip() for value in _all(scope, b"content-type")]
    if not any(given) and not _all(scope, b"origin") and not _all(scope, b"sec-fetch-site"):
        return None
    if len(given) == 1 and _is_json(given[0]):
        return None
    return UnsupportedMediaType(
        f"the body's content type is {', '.join(given)[:200] or 'missing'}: send the header Content-Type: "
        "application/json."
    )


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _host(scope: Scope) -> Authority | None:
    """Return the host that a request is for; None if it need not name one.

    Raises:
        BadHost: it names none, several, or something that is no host.
    """
    target = scope.get("state", {}).get("target_authority")
    given = _all(scope, b"host") or ([target] if target else [])
    if not given and scope.get("http_version") == "1.0":  # old health checks send no Host; browsers always do
        return None
    if len(given) != 1:
        raise BadHost(f"a request needs one Host header, and this one has {len(given) or 'none'}.")
    host = parse_authority(given[0].strip())
    if host is None:
        raise BadHost(f"the Host header {given[0][:200]!r} is not a host's name with or without a port.")
    if target is not None and parse_authority(target) != host:
        raise BadHost(f"the request's target names {target[:200]!r} and its Host header {given[0][:200]!r}.")
    return host


def _followed(scope: Scope) -> bool:
    """Return whether a browser opens this as a page of its own, not inside another page."""
    return _all(scope, b"sec-fetch-mode") == ["navigate"] and _all(scope, b"sec-fetch-dest") == ["document"]


def _all(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def _refuse(fault: VerbatimError, scope: Scope, receive: Receive, send: Send) -> None:
    scope.setdefault("state", {})["told"] = {"refused": fault.code}
    await error_response(fault, scope)(scope, receive, send)

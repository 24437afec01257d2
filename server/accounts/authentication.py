"""Checks the key of every request before its body is read. A few paths need no key."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import VerbatimError
from server.accounts.charging import Meter
from server.errors import Unauthorized, error_response
from server.ledger.records import Key

__all__ = ["OPEN", "Authentication", "key_of"]

OPEN: Final = frozenset({"/health", "/health/live", "/health/ready", "/api/v1/receipts/key", "/v1/receipts/key"})
"""The paths that need no key: those of the server's health, and the public key that it signs receipts with. Paths that
do not exist need one, so that trying paths tells a stranger nothing."""
_HEADERS: Final = (b"authorization", b"x-api-key")


class Authentication:
    """Pure ASGI: refuses requests without a valid key, and adds the key's limits to every response.

    Args:
        meter: looks keys up.
        retry_after: seconds for `Retry-After` where keys cannot be looked up.
        open_paths: those that need no key.
    """

    def __init__(self, app: ASGIApp, meter: Meter, retry_after: int, open_paths: frozenset[str] = OPEN) -> None:
        self._app = app
        self._open = open_paths
        self._meter = meter
        self._retry_after = retry_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        try:
            key = await self._key(scope)
        except VerbatimError as error:
            await error_response(error, scope, self._retry_after)(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._meter.limits.headers(key).items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, send_with_limits)

    async def _key(self, scope: Scope) -> Key:
        given = ((name, value.decode("latin-1").strip()) for name, value in scope["headers"] if name in _HEADERS)
        # Clients without a key of Anthropic's kind may send that header empty.
        secrets = {_secret(name, value) for name, value in given if value or name != b"x-api-key"}
        if not secrets:
            raise Unauthorized(
                "this server needs a key: send the header Authorization: Bearer KEY, or X-Api-Key: KEY as clients of "
                "Anthropic's API do."
            )
        if len(secrets) > 1:
            raise Unauthorized("the request's headers hold more than one key.")
        key = await self._meter.authenticate(secrets.pop())
        if key is None:
            raise Unauthorized("this key is not known here, was revoked, or has expired.")
        return key


def _secret(header: bytes, value: str) -> str:
    """Return the key that a header holds."""
    if header == b"x-api-key":
        return value
    kind, _, secret = value.partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise Unauthorized("the Authorization header must be Bearer, a space and the key.")
    return secret.strip()


def key_of(scope: Scope) -> Key | None:
    """Return the key that a request was authenticated with; None where the server has no keys."""
    key: Key | None = scope.get("state", {}).get("key")
    return key

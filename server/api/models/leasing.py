"""Leases of engines: what a request uses stays loaded until the request is over, however it ends."""

from __future__ import annotations

from contextlib import ExitStack

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from engine import EngineProtocol, NoRoom, Registry, told_to
from server.accounts.account import Account
from server.api.generation import unless_disconnected
from server.errors import ClientGone

__all__ = ["Leases", "engine_of"]


class Leases:
    """Pure ASGI: releases what a request has leased once its response is sent, or its client is gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as leases:
            scope.setdefault("state", {})["leases"] = leases
            await self._app(scope, receive, send)


async def engine_of(registry: Registry, account: Account, request: Request, model: str) -> EngineProtocol:
    """Return the engine of a model, which stays loaded until the request is over. One on demand is waited for.

    The request's body must have been read.

    Raises:
        ClientGone: the client left while the model was being loaded, which goes on.
        VerbatimError: as `Registry.acquire`; what it says of other models is what the account may know.
    """

    async def leased() -> EngineProtocol:
        lease = await registry.acquire(model)
        request.scope["state"]["leases"].callback(lease.release)
        return lease.engine

    try:
        engine = await unless_disconnected(leased(), request.receive)
    except NoRoom as error:
        raise told_to(error, account.may_use) from None
    if engine is None:
        raise ClientGone
    return engine

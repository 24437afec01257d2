"""The endpoints for whoever runs the server: `/metrics`, `/machine`, `/keys`. They ask no model and count nothing."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.accounts.account import account_of
from server.accounts.authentication import key_of
from server.accounts.managing import may_manage, require_management
from server.api import openapi
from server.api.admission import Service
from server.errors import NoKeys
from server.ledger.records import Key
from server.metrics.exposition import exposition
from server.metrics.facts import Facts
from server.metrics.machine import machine_object

__all__ = ["METRICS", "machine_routes", "metrics_routes"]

METRICS: Final = "/metrics"


def metrics_routes(service: Service) -> APIRouter:
    """Return the route of Prometheus, which has no prefix. None where the settings switch it off."""
    router = APIRouter()
    if service.settings.metrics == "off":
        return router

    @router.get(METRICS, summary="Metrics, as Prometheus reads them.", responses=openapi.METRICS, response_model=None)
    async def metrics(request: Request) -> Response:
        if service.settings.metrics != "open":
            require_management(request.scope, service.meter)
        body, kind = exposition(service.metrics, ",".join(request.headers.getlist("accept")))
        return Response(body, headers={"content-type": kind, "cache-control": "no-store"})

    return router


def machine_routes(service: Service) -> APIRouter:
    """Return the routes `/machine` and `/keys`."""
    router = APIRouter()
    facts = Facts.of_this_machine()

    @router.get(
        "/machine", summary="This machine and its models now: the numbers of `/metrics`.", responses=openapi.MACHINE
    )
    async def machine(request: Request) -> dict[str, Any]:
        return machine_object(
            service.metrics.snapshot(),
            facts,
            may_use=account_of(service.meter, key_of(request.scope)).may_use,
            may_manage=may_manage(request.scope, service.meter),
            receipts=service.receipts.health(),
        )

    @router.get("/keys", summary="All keys: balances, limits and usage. For admin keys.", responses=openapi.KEYS)
    async def keys(request: Request) -> dict[str, Any]:
        key = key_of(request.scope)
        if service.meter is None or key is None:
            raise NoKeys("this server has no keys.")
        require_management(request.scope, service.meter)
        found = await service.meter.keys(key)
        return {"object": "list", "data": [_key_object(one, sums) for one, sums in found]}

    return router


def _key_object(key: Key, sums: dict[str, int]) -> dict[str, Any]:
    """Return a key as an admin sees it: never its secret, of which the ledger has only a hash, and not that hash."""
    return {
        "id": key.id,
        "object": "key",
        "name": key.name,
        "shown": key.shown,
        "state": key.state(time.time()),  # noqa: TID251  the ledger's times are the wall clock's
        "admin": key.admin,
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
        "models": list(key.models),
        "balance": key.balance,
        "held": key.held,
        "limits": dataclasses.asdict(key.limits),
        "usage": sums,
    }

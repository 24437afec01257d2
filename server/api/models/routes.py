"""The endpoints below `/models`: list them, look at one, load and unload it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from engine import ModelNotFound, ModelStatus, NoRoom, told_to
from server.accounts.account import Account, account_of
from server.accounts.authentication import key_of
from server.accounts.managing import require_management
from server.api import openapi
from server.api.admission import Service, ignored_fields
from server.api.generation import unless_disconnected
from server.api.models.fields import LOAD, UNLOAD, parse_load, parse_unload
from server.api.models.objects import model_details, model_object
from server.errors import ClientGone

__all__ = ["model_routes"]


def model_routes(service: Service) -> APIRouter:
    """Return the routes `/models`, `/models/{id}`, `/models/{id}/load` and `/models/{id}/unload`.

    An id may hold slashes.
    """
    router = APIRouter()

    @router.get("/models", summary="The models of this server.")
    async def models(request: Request) -> dict[str, Any]:
        account = account_of(service.meter, key_of(request.scope))
        usable = [status for status in service.registry.list() if account.may_use(status.id)]
        return {"object": "list", "data": [model_object(status) for status in usable]}

    @router.get("/models/{model_id:path}", summary="One model: its limits, defaults and fingerprint, part by part.")
    async def model(model_id: str, request: Request) -> dict[str, Any]:
        account = account_of(service.meter, key_of(request.scope))
        for status in service.registry.list():
            if status.id == model_id and account.may_use(status.id):
                return model_details(status)
        if model_id.endswith(("/load", "/unload")):  # no model has this id: what was meant is a path for `POST`
            raise HTTPException(405)
        raise ModelNotFound(f"the model {model_id[:200]!r} does not exist.", param="model")

    @router.post(
        "/models/{model_id:path}/load",
        summary="Load a model, also one that has failed before; needs an admin key, or this machine.",
        openapi_extra={"requestBody": openapi.optional_body(LOAD, {"wait": False})},
        responses=openapi.LOAD,
        response_model=None,
    )
    async def load(model_id: str, request: Request) -> Response:
        account = _manager(service, request)
        async with service.bodies.of(request, account.group, parse_load) as checked:
            wait, ignored = await checked("")
        headers = ignored_fields(ignored, service.settings)
        account.admit_model(model_id)
        try:
            status = await unless_disconnected(service.registry.load(model_id, wait=wait), request.receive)
        except NoRoom as error:
            raise told_to(error, account.may_use) from None
        return _state(status, headers)

    @router.post(
        "/models/{model_id:path}/unload",
        summary="Unload a model that has no requests; needs an admin key, or this machine.",
        openapi_extra={"requestBody": openapi.optional_body(UNLOAD, {"wait_seconds": 60})},
        responses=openapi.UNLOAD,
        response_model=None,
    )
    async def unload(model_id: str, request: Request) -> Response:
        account = _manager(service, request)
        async with service.bodies.of(request, account.group, parse_unload) as checked:
            seconds, ignored = await checked("")
        headers = ignored_fields(ignored, service.settings)
        account.admit_model(model_id)
        status = await unless_disconnected(service.registry.unload(model_id, seconds), request.receive)
        return _state(status, headers)

    return router


def _manager(service: Service, request: Request) -> Account:
    """Count a request, and return its account if it may manage the server.

    Raises:
        ManagementNotAllowed: it may not.
    """
    account = account_of(service.meter, key_of(request.scope))
    account.count()
    require_management(request.scope, service.meter)
    return account


def _state(status: ModelStatus | None, headers: dict[str, str]) -> Response:
    """Answer with a model as `GET /models` has it: 200 once it is what was asked for, 202 while it is not."""
    if status is None:
        raise ClientGone
    done = status.state not in ("waiting", "loading", "unloading")
    return JSONResponse(model_object(status), status_code=200 if done else 202, headers=headers)

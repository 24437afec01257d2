"""The application: routes, and the order in which a request is looked at. Knows no torch and no sampling rule.

request id → host and origin (400, 403) → key (401) → type of the body (415) → its minute and balance (429, 402) → room
for the body (503) → body, while it is read (413, 408) → fields (400, 422) → model (404, 503) → prepare on a
worker of the model (400, 422) → its prompt (429) → hold (402) → submit (503) → only now 200
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import InvalidParameter, ModelNotFound, ModelStatus, Registry, VerbatimError
from server import logs
from server.accounts.authentication import OPEN, Authentication, key_of
from server.accounts.charging import Account, Meter
from server.api import chat_request as schema
from server.api import openapi
from server.api.chat_reply import Reply
from server.api.chat_request import parse
from server.api.generation import CompletionResponse, unless_disconnected
from server.errors import ClientGone, NoKeys, error_response, install
from server.ledger.store import read_since
from server.settings import ServerSettings
from server.wire.bodies import Bodies
from server.wire.origin import JsonOnly, NoForeignPages

PREFIXES: Final = ("/api/v1", "/v1")
_SILENT: Final = frozenset({"/health/live"})
"""Without keys `/health/ready` names the models."""
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def create_app(registry: Registry, settings: ServerSettings | None = None, meter: Meter | None = None) -> FastAPI:
    """The ASGI application over a registry. The registry's owner starts it; the application closes it at its end.

    With a `meter` every path but those of `authentication.OPEN` needs a key; it is closed with the application, too.
    """
    settings = settings or ServerSettings()
    bodies = Bodies(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        bodies.close()
        registry.close()
        if meter:
            await meter.drain()
            meter.close()

    app = FastAPI(
        title="verbatim",
        description="Chat completions whose every reply can be reproduced.",
        docs_url=None,  # the pages load scripts from the internet
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # a path is right or it is a 404 with a body, as every error
        # Whatever the environment says, nothing is sent anywhere. (Versions before 0.165 keep the word and ignore it.)
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    api = _completions(registry, settings, meter, bodies)
    for prefix in PREFIXES:
        app.include_router(api, prefix=prefix)
    app.include_router(_health(registry, meter))
    install(app, settings.retry_after_seconds)
    app.add_middleware(JsonOnly)  # the last one that is added is the first one that sees a request
    if meter:
        app.add_middleware(Authentication, meter=meter, retry_after=settings.retry_after_seconds)
    if settings.cors_origins:
        # A page of the internet asks for a private address by name, and starlette that knows the question would say no.
        named = inspect.signature(CORSMiddleware).parameters
        private: dict[str, Any] = {"allow_private_network": True} if "allow_private_network" in named else {}
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            **private,
        )
    app.add_middleware(NoForeignPages, settings=settings, keys=meter is not None, silent=OPEN if meter else _SILENT)
    app.add_middleware(Envelope)
    if meter:
        app.openapi = lambda: openapi.with_keys(FastAPI.openapi(app), OPEN)  # type: ignore[method-assign]
    return app


def _completions(registry: Registry, settings: ServerSettings, meter: Meter | None, bodies: Bodies) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/chat/completions",
        summary="Create a synchronous or streaming chat completion.",
        openapi_extra={"requestBody": openapi.REQUEST_BODY},
        responses=openapi.RESPONSES,
        response_model=None,
    )
    async def chat_completions(request: Request) -> Response:
        key = key_of(request.scope)
        account = Account(meter, key) if meter and key else None
        if account:
            account.meter.admit(account.key)
        group = account.key.id if account else ""
        async with bodies.of(request, group, parse) as checked:
            wanted = await checked(f"chatcmpl-{secrets.token_hex(16)}")
            headers = _ignored(wanted.ignored, settings)
            if account:
                account.meter.check_model(account.key, wanted.model)
            engine = registry.get(wanted.model)
            generation = dataclasses.replace(wanted.generation, group=group)
            prepared = await unless_disconnected(engine.prepare(generation), request.receive)
            if prepared is None:
                raise ClientGone
        if prepared.ignored:
            headers = _ignored(wanted.ignored + prepared.ignored, settings)
        info = engine.info
        if account:
            prepared = account.meter.admit_prompt(account.key, prepared)
            account.model, account.fingerprint = info.id, info.system_fingerprint
        request.scope["state"]["told"] = {"model": info.id, "completion": prepared.request_id}
        created = int(time.time())  # noqa: TID251  the API wants the wall clock
        reply = Reply(prepared.request_id, created, info.id, info.system_fingerprint, prepared)
        return CompletionResponse(
            engine,
            reply,
            settings,
            stream=wanted.stream,
            include_usage=wanted.include_usage,
            headers=headers,
            account=account,
        )

    @router.get("/models", summary="The models of this server.")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [model_object(status) for status in _seen(registry, request)]}

    @router.get("/models/{model_id:path}", summary="One model: its limits, defaults and fingerprint.")
    async def model(model_id: str, request: Request) -> dict[str, Any]:
        for status in _seen(registry, request):
            if status.id == model_id:
                return model_object(status)
        raise ModelNotFound(f"the model {model_id[:200]!r} does not exist.", param="model")

    @router.get("/usage", summary="What the key of this request has used, and has left.", responses=openapi.USAGE)
    async def usage(request: Request, since: str | None = None, by: str | None = None) -> dict[str, Any]:
        key = key_of(request.scope)
        if meter is None or key is None:
            raise NoKeys("usage is recorded by key, and this server has no keys.")
        rows = await meter.usage(key, read_since(since), _one_of(by, ("day", "model"), "by"))
        left = None if key.balance is None else key.balance - key.held
        limits = dataclasses.asdict(key.limits)
        return {"object": "usage", "key": key.name, "balance": left, "limits": limits, "data": rows}

    return router


def _seen(registry: Registry, request: Request) -> list[ModelStatus]:
    """The models that the key of a request may use."""
    key = key_of(request.scope)
    return [status for status in registry.list() if key is None or not key.models or status.id in key.models]


def _one_of(value: str | None, allowed: tuple[str, ...], name: str) -> str | None:
    if value is not None and value not in allowed:
        raise InvalidParameter(f"{name} must be one of {', '.join(allowed)}, not {value[:100]!r}.", param=name)
    return value


def _health(registry: Registry, meter: Meter | None) -> APIRouter:
    """Where there are keys, not everybody may know the models and how they are."""
    router = APIRouter(prefix="/health")

    @router.get("/live", summary="The process answers.")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @router.get("/ready", summary="Every model is loaded, alive and making progress.")
    async def ready() -> JSONResponse:
        states = {status.id: _state(registry, status) for status in registry.list()}
        good = all(state == "ready" for state in states.values())
        kept, books = meter.health() if meter else (True, {"models": states})
        good = good and kept
        body = {"status": "ready" if good else "not ready", **books}
        return JSONResponse(body, status_code=200 if good else 503)

    return router


def _state(registry: Registry, status: ModelStatus) -> str:
    """`ready`, or why not."""
    if status.state != "ready":
        return f"{status.state}: {status.detail}"
    try:
        stats = registry.get(status.id).stats()
    except VerbatimError as error:
        return f"dead: {error.message}"
    if not stats.alive:
        return "dead: the engine has stopped; see the log"
    if stats.stalled:
        return "stalled: a step has been running for longer than the stall limit"
    return "ready"


def model_object(status: ModelStatus) -> dict[str, Any]:
    """A model as the OpenAI API lists it, with what is known of it here."""
    info = status.info
    base = {"id": status.id, "object": "model", "created": info.created if info else 0, "owned_by": "local"}
    if info is None:
        return {**base, "state": status.state, "detail": status.detail}
    return {
        **base,
        "state": status.state,
        "architecture": info.architecture,
        "context_length": info.context_length,
        "cache_tokens": info.cache_tokens,
        "max_sequences": info.max_sequences,
        "vocab_size": info.vocab_size,
        "device": info.device,
        "dtype": info.dtype,
        "linear": info.linear,
        "runner": info.runner,
        "system_fingerprint": info.system_fingerprint,
        "reproducible": {"holds": info.law.holds, "reason": info.law.reason, "checks": dict(info.law.checks)},
        "default_sampling": dict(info.default_sampling),
        "tool_calls": {"form": info.tool_calls, "source": info.tool_calls_source},
        "reasoning": dict(zip(("open", "close"), info.reasoning, strict=True)) if info.reasoning else None,
    }


def _ignored(names: tuple[str, ...], settings: ServerSettings) -> dict[str, str]:
    if not names:
        return {}
    if settings.strict_params:
        raise InvalidParameter(f"{names[0][:200]} is not a known field.", param=names[0][:200], code="unknown_field")
    return {"x-ignored-fields": schema.header_value(names)}


class Envelope:
    """Around every exchange: its id, its line in the log, and the last resort for an error that nothing else has turned
    into an answer.

    The id is the client's own if it is harmless, else a fresh one. The last resort stands here and not in a handler
    for `Exception`: starlette runs that one outside, where the answer would have no id, and raises again.
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
        except Exception as error:
            if status:
                raise  # too late for a status: the connection must break, or half an answer would look whole
            await error_response(error)(scope, receive, send_with_id)
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

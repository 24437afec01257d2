"""Composes the application: routes, middleware, and the order in which a request is checked. Knows no torch.

request id → one form of path and method → host and origin (400, 403) → the page for browsers → key (401) → type of the
body (415) → server/api/admission.py → only now 200
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from engine import InvalidParameter, Registry
from server.accounts.authentication import OPEN, Authentication, key_of
from server.accounts.charging import Meter
from server.api import chat_request, openapi
from server.api.admission import Service, answer
from server.api.chat_reply import ChunkWriter, Collector
from server.api.completions import request as completions_request
from server.api.completions.fields import COMPLETION
from server.api.completions.reply import CompletionChunks, CompletionCollector
from server.api.generation import Endpoint
from server.api.messages import request as messages_request
from server.api.messages.events import MessageEvents
from server.api.messages.fields import MESSAGE
from server.api.messages.reply import MessageCollector
from server.api.messages.routes import count_routes
from server.api.models.leasing import Leases
from server.api.models.objects import is_ready, state_of
from server.api.models.routes import model_routes
from server.api.operation.routes import METRICS, machine_routes, metrics_routes
from server.api.receipts.routes import receipt_routes
from server.api.responses import request as responses_request
from server.api.responses.fields import RESPONSES
from server.api.responses.reply import ResponseCollector, ResponseEvents
from server.api.tokenizer.routes import tokenizer_routes
from server.errors import NoKeys, install
from server.ledger.records import read_since
from server.metrics.http import Counted, Endpoints
from server.metrics.snapshot import Metrics, server_version
from server.page.files import read_page
from server.page.serving import Page
from server.receipts.service import Receipts
from server.settings import ServerSettings
from server.wire.bodies import Bodies
from server.wire.connections import Connections
from server.wire.envelope import Envelope
from server.wire.one_form import OneForm
from server.wire.origin import JsonOnly, NoForeignPages, Preflights
from server.wire.paths import Paths, install_paths

PREFIXES: Final = ("/api/v1", "/v1")
_SILENT: Final = frozenset({"/health/live"})
"""Paths that tell nothing about models. Without keys `/health` and `/health/ready` name them."""


def create_app(
    registry: Registry,
    settings: ServerSettings | None = None,
    meter: Meter | None = None,
    receipts: Receipts | None = None,
    connections: Connections | None = None,
) -> FastAPI:
    """Build the ASGI application over a registry. The caller starts the registry; the application closes it.

    With a `meter` every path except `authentication.OPEN` needs a key. The application closes the meter and the
    `receipts`, too. Without those, receipts are neither signed nor kept. `connections`: those that the metrics tell.
    """
    settings = settings or ServerSettings()
    receipts = receipts or Receipts(clock=time.time)  # noqa: TID251  the wall clock's days
    bodies = Bodies(settings)
    metrics = Metrics(registry, meter, bodies.memory, connections)
    service = Service(registry, settings, meter, bodies, receipts, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.bodies.close()
        registry.close()
        if meter:
            await meter.drain()
            meter.close()
        receipts.close()

    app = FastAPI(
        title="verbatim",
        description="Completions whose every reply can be reproduced.",
        docs_url=None,  # the pages load scripts from the internet
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # `OneForm` answers such paths as they are
        # Nothing is sent anywhere, whatever the environment says. Versions before 0.165 ignore this argument.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    paths = Paths(PREFIXES)
    paths.add(app.router)  # the document

    def include(routes: APIRouter, prefix: str = "") -> None:
        app.include_router(routes, prefix=prefix)
        paths.add(routes, prefix)

    for prefix in PREFIXES:
        for routes in (_completions(service), model_routes(service), _usage(service)):
            include(routes, prefix)
        for routes in (tokenizer_routes(service), receipt_routes(service), count_routes(service)):
            include(routes, prefix)
        include(machine_routes(service), prefix)
    include(tokenizer_routes(service))  # where clients of vLLM look for them
    include(_health(registry, meter, receipts))
    include(_version())
    include(metrics_routes(service))
    install(app, settings.retry_after_seconds)
    install_paths(app, paths, settings.retry_after_seconds)
    opened = OPEN | {METRICS} if settings.metrics == "open" else OPEN
    _add_middleware(app, settings, meter, opened)
    app.add_middleware(Counted, counts=metrics.counts, endpoints=Endpoints(paths.spelled, PREFIXES))
    if meter:
        app.openapi = lambda: openapi.with_keys(FastAPI.openapi(app), opened)  # type: ignore[method-assign]
    return app


def _add_middleware(app: FastAPI, settings: ServerSettings, meter: Meter | None, opened: frozenset[str]) -> None:
    """Add the middleware. The last one added is the first one to see a request."""
    app.add_middleware(JsonOnly)
    if meter:
        app.add_middleware(Authentication, meter=meter, retry_after=settings.retry_after_seconds, open_paths=opened)
    if settings.cors_origins:
        # Chrome asks whether a public page may use a private address. Newer versions of starlette refuse by default.
        named = inspect.signature(Preflights).parameters
        private: dict[str, Any] = {"allow_private_network": True} if "allow_private_network" in named else {}
        app.add_middleware(
            Preflights,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            **private,
        )
    if settings.ui and (files := read_page()):
        app.add_middleware(Page, files=files)
    app.add_middleware(NoForeignPages, settings=settings, keys=meter is not None, silent=OPEN if meter else _SILENT)
    app.add_middleware(Leases)
    app.add_middleware(OneForm)
    app.add_middleware(Envelope)


def _completions(service: Service) -> APIRouter:
    router = APIRouter()
    chat = Endpoint("chatcmpl-", chat_request.parse, Collector, ChunkWriter)
    plain = Endpoint("cmpl-", completions_request.parse, CompletionCollector, CompletionChunks)
    items = Endpoint("resp_", responses_request.parse, ResponseCollector, ResponseEvents, responses_request.own_name)
    message = Endpoint(
        "msg_",
        messages_request.parse,
        MessageCollector,
        MessageEvents,
        messages_request.own_name,
        messages_request.fitted,
    )

    @router.post(
        "/chat/completions",
        summary="Create a synchronous or streaming chat completion.",
        openapi_extra={"requestBody": openapi.CHAT_BODY},
        responses=openapi.RESPONSES,
        response_model=None,
    )
    async def chat_completions(request: Request) -> Response:
        return await answer(service, chat, request)

    @router.post(
        "/completions",
        summary="Continue a text, or several, synchronously or streaming.",
        openapi_extra={"requestBody": openapi.request_body(COMPLETION, openapi.EXAMPLES["completion"])},
        responses=openapi.COMPLETION_RESPONSES,
        response_model=None,
    )
    async def completions(request: Request) -> Response:
        return await answer(service, plain, request)

    @router.post(
        "/responses",
        summary="Create a response, synchronously or streaming: items in, items out. Nothing is stored.",
        openapi_extra={"requestBody": openapi.request_body(RESPONSES, openapi.EXAMPLES["response"])},
        responses=openapi.RESPONSE_RESPONSES,
        response_model=None,
    )
    async def responses(request: Request) -> Response:
        return await answer(service, items, request)

    @router.post(
        "/messages",
        summary="Create a message, synchronously or streaming, as Anthropic's API does.",
        openapi_extra={"requestBody": openapi.request_body(MESSAGE, openapi.EXAMPLES["message"])},
        responses=openapi.MESSAGE_RESPONSES,
        response_model=None,
    )
    async def messages(request: Request) -> Response:
        return await answer(service, message, request)

    return router


def _usage(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/usage", summary="What the key of this request has used, and has left.", responses=openapi.USAGE)
    async def usage(request: Request, since: str | None = None, by: str | None = None) -> dict[str, Any]:
        key = key_of(request.scope)
        if service.meter is None or key is None:
            raise NoKeys("usage is recorded by key, and this server has no keys.")
        rows = await service.meter.usage(key, read_since(since), _one_of(by, ("day", "model"), "by"))
        left = None if key.balance is None else key.balance - key.held
        limits = dataclasses.asdict(key.limits)
        return {"object": "usage", "key": key.name, "balance": left, "limits": limits, "data": rows}

    return router


def _one_of(value: str | None, allowed: tuple[str, ...], name: str) -> str | None:
    if value is not None and value not in allowed:
        raise InvalidParameter(f"{name} must be one of {', '.join(allowed)}, not {value[:100]!r}.", param=name)
    return value


def _health(registry: Registry, meter: Meter | None, receipts: Receipts) -> APIRouter:
    """Routes for health checks. Nobody needs a key for them, so with keys they do not tell about the models."""
    router = APIRouter()

    @router.get("/health/live", summary="The process answers.")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @router.get("/health", summary="The same as `/health/ready`, where clients of other servers look for it.")
    @router.get("/health/ready", summary="Every model that is loaded at start is loaded, alive and making progress.")
    async def ready() -> JSONResponse:
        models = registry.list()
        states = {status.id: state_of(registry, status) for status in models}
        good, told = meter.health() if meter else (True, {"models": states})
        good = good and all(is_ready(status, states[status.id]) for status in models)
        body = {"status": "ready" if good else "not ready", **told, **receipts.health()}
        return JSONResponse(body, status_code=200 if good else 503)

    return router


def _version() -> APIRouter:
    """The route for the version. With keys it needs one: which faults a server has is nobody else's business."""
    router = APIRouter()
    found = server_version()

    @router.get("/version", summary="The version of this server.")
    async def version() -> dict[str, str]:
        return {"version": found}

    return router

"""The application: routes, and the order in which a request is looked at. Knows no torch and no sampling rule.

request id → body, while it is read (413) → fields (400, 422) → model (404, 503) → prepare on the model's own worker
(400, 422) → submit (503) → only now 200
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import InvalidParameter, ModelNotFound, ModelStatus, Registry, VerbatimError
from server import openapi, schema
from server.completions import CompletionResponse
from server.errors import BodyTooLarge, ClientGone, error_response, install
from server.responses import Reply
from server.settings import ServerSettings

PREFIXES: Final = ("/api/v1", "/v1")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def create_app(registry: Registry, settings: ServerSettings | None = None) -> FastAPI:
    """The ASGI application over a registry. The registry's owner starts it; the application closes it at its end."""
    settings = settings or ServerSettings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        registry.close()

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
    api = _completions(registry, settings)
    for prefix in PREFIXES:
        app.include_router(api, prefix=prefix)
    app.include_router(_health(registry))
    install(app, settings.retry_after_seconds)
    app.add_middleware(Envelope)
    return app


def _completions(registry: Registry, settings: ServerSettings) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/chat/completions",
        summary="Create a synchronous or streaming chat completion.",
        openapi_extra={"requestBody": openapi.REQUEST_BODY},
        responses=openapi.RESPONSES,
        response_model=None,
    )
    async def chat_completions(request: Request) -> Response:
        raw = await read_body(request, settings.max_body_bytes)
        wanted = schema.parse(raw, f"chatcmpl-{secrets.token_hex(16)}")
        headers = _ignored(wanted.ignored, settings)
        engine = registry.get(wanted.model)
        prepared = await engine.prepare(wanted.generation)
        if prepared.ignored:
            headers = _ignored(wanted.ignored + prepared.ignored, settings)
        info = engine.info
        created = int(time.time())  # noqa: TID251  the API wants the wall clock
        reply = Reply(prepared.request_id, created, info.id, info.system_fingerprint, prepared)
        return CompletionResponse(
            engine, reply, settings, stream=wanted.stream, include_usage=wanted.include_usage, headers=headers
        )

    @router.get("/models", summary="The models of this server.")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(status) for status in registry.list()]}

    @router.get("/models/{model_id:path}", summary="One model: its limits, defaults and fingerprint.")
    async def model(model_id: str) -> dict[str, Any]:
        for status in registry.list():
            if status.id == model_id:
                return model_object(status)
        raise ModelNotFound(f"the model {model_id[:200]!r} does not exist.", param="model")

    return router


def _health(registry: Registry) -> APIRouter:
    router = APIRouter(prefix="/health")

    @router.get("/live", summary="The process answers.")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @router.get("/ready", summary="Every model is loaded, alive and making progress.")
    async def ready() -> JSONResponse:
        states = {status.id: _state(registry, status) for status in registry.list()}
        good = all(state == "ready" for state in states.values())
        body = {"status": "ready" if good else "not ready", "models": states}
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
        "runner": info.runner,
        "system_fingerprint": info.system_fingerprint,
        "reproducible": {"holds": info.law.holds, "reason": info.law.reason, "checks": dict(info.law.checks)},
        "default_sampling": dict(info.default_sampling),
        "tool_calls": {"form": info.tool_calls, "source": info.tool_calls_source},
        "reasoning": dict(zip(("open", "close"), info.reasoning, strict=True)) if info.reasoning else None,
    }


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is known to be too large.

    Raises:
        BodyTooLarge: by its announced length before it is read, else while it is.
        ClientGone: the connection closed before the body was complete.
    """
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
        raise _too_large(f"{announced[:20]} bytes", limit)
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(f"more than {limit} bytes", limit)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has {size}; this server takes {limit}.", limit=limit)


def _ignored(names: tuple[str, ...], settings: ServerSettings) -> dict[str, str]:
    if not names:
        return {}
    if settings.strict_params:
        raise InvalidParameter(f"{names[0][:200]} is not a known field.", param=names[0][:200], code="unknown_field")
    return {"x-ignored-fields": schema.header_value(names)}


class Envelope:
    """Around every exchange: its id, and the last resort for an error that nothing else has turned into an answer.

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

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            return
        except Exception as error:
            if started:
                raise  # too late for a status: the connection must break, or half an answer would look whole
            await error_response(error)(scope, receive, send_with_id)

"""The endpoints that turn texts into tokens and back, as vLLM has them: nothing is computed, and nothing is charged."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine import EngineProtocol, InvalidFormat
from server.accounts.account import Account, account_of
from server.accounts.authentication import key_of
from server.api import openapi
from server.api.admission import Service, ignored_fields
from server.api.generation import unless_disconnected
from server.api.models.leasing import engine_of
from server.api.tokenizer.fields import DETOKENIZE, TOKENIZE
from server.api.tokenizer.requests import TextOf, TokensOf, parse_detokenize, parse_tokenize
from server.errors import ClientGone
from server.json_text import to_json

__all__ = ["answer_from_tokenizer", "tokenizer_routes"]

_Asked = TypeVar("_Asked", TokensOf, TextOf)


def tokenizer_routes(service: Service) -> APIRouter:
    """Return the routes `/tokenize`, `/detokenize` and `/tokenizer_info`."""
    router = APIRouter()

    @router.post(
        "/tokenize",
        summary="The tokens of a text, or of messages as a chat completion would have them.",
        openapi_extra={"requestBody": openapi.request_body(TOKENIZE, openapi.EXAMPLES["tokenize"])},
        responses=openapi.TOKENIZER_RESPONSES,
        response_model=None,
    )
    async def tokenize(request: Request) -> Response:
        return await answer_from_tokenizer(service, request, parse_tokenize, _tokens)

    @router.post(
        "/detokenize",
        summary="The text of tokens.",
        openapi_extra={"requestBody": openapi.request_body(DETOKENIZE, openapi.EXAMPLES["detokenize"])},
        responses=openapi.TOKENIZER_RESPONSES,
        response_model=None,
    )
    async def detokenize(request: Request) -> Response:
        return await answer_from_tokenizer(service, request, parse_detokenize, _text)

    @router.get("/tokenizer_info", summary="A model's tokenizer: its class, its special tokens, its chat template.")
    async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
        account = account_of(service.meter, key_of(request.scope))
        account.count()
        engine = await _engine(service, account, request, model)
        found = dataclasses.asdict(await engine.tokenizer())
        return {**found, "model": engine.info.id, "model_max_length": engine.info.context_length}

    return router


async def answer_from_tokenizer(
    service: Service,
    request: Request,
    parse: Callable[[bytes, str], _Asked],
    ask: Callable[[EngineProtocol, _Asked, str], Awaitable[dict[str, Any]]],
) -> Response:
    """Count, read and parse a request, and answer it by asking the engine.

    Raises:
        VerbatimError: the request is refused.
        ClientGone: the client left.
    """
    account = account_of(service.meter, key_of(request.scope))
    account.count()
    async with service.bodies.of(request, account.group, parse) as checked:
        asked = await checked("tokens-" + secrets.token_hex(16))
        headers = ignored_fields(asked.ignored, service.settings)
        engine = await _engine(service, account, request, asked.model)
        body = await unless_disconnected(_made(ask(engine, asked, account.group)), request.receive)
    if body is None:
        raise ClientGone
    return Response(to_json(body).encode(), media_type="application/json", headers=headers)


async def _made(answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    return await answer


async def _tokens(engine: EngineProtocol, asked: TokensOf, group: str) -> dict[str, Any]:
    found = await engine.tokenize(dataclasses.replace(asked.request, group=group))
    return {
        "count": len(found.tokens),
        "max_model_len": engine.info.context_length,
        "tokens": found.tokens,
        "token_strs": found.strings if asked.strings else None,
    }


async def _text(engine: EngineProtocol, asked: TextOf, group: str) -> dict[str, Any]:
    return {"prompt": await engine.detokenize(asked.tokens, group)}


async def _engine(service: Service, account: Account, request: Request, model: str | None) -> EngineProtocol:
    """Return the engine of a model, or of the only one that the account may use.

    Raises:
        InvalidFormat: no model was named, and there are several.
        ClientGone, VerbatimError: as `engine_of`.
    """
    if model is None:
        found = [status for status in service.registry.list() if account.may_use(status.id)]
        ids = {status.id for status in found}
        usable = [status.id for status in found if status.parent not in ids]  # adapters have their model's tokenizer
        if len(usable) != 1:
            raise InvalidFormat(
                f"model is required where there is not just one; there are: {', '.join(usable)}."[:1000],
                param="model",
                code="missing_field",
            )
        model = usable[0]
    account.admit_model(model)
    return await engine_of(service.registry, account, request, model)

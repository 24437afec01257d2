"""`POST /messages/count_tokens`: how many tokens the prompt of a message has. Nothing is computed or charged."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine import EngineProtocol
from server.api import openapi
from server.api.admission import Service, own_names, renamed
from server.api.messages.fields import COUNT
from server.api.messages.request import own_name, parse_count
from server.api.tokenizer.requests import TokensOf
from server.api.tokenizer.routes import answer_from_tokenizer

__all__ = ["count_routes"]


def count_routes(service: Service) -> APIRouter:
    """Return the route `/messages/count_tokens`."""
    router = APIRouter()

    @router.post(
        "/messages/count_tokens",
        summary="Count the tokens of a message's prompt, as Anthropic's API does.",
        openapi_extra={"requestBody": openapi.request_body(COUNT, openapi.EXAMPLES["count"])},
        responses=openapi.TOKENIZER_RESPONSES,
        response_model=None,
    )
    async def count_tokens(request: Request) -> Response:
        return await answer_from_tokenizer(service, request, parse_count, _count)

    return router


async def _count(engine: EngineProtocol, asked: TokensOf, group: str) -> dict[str, Any]:
    work = engine.tokenize(dataclasses.replace(asked.request, group=group))
    found = await renamed(work, own_names(own_name, asked.places))
    return {"input_tokens": len(found.tokens)}

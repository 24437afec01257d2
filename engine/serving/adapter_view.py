"""An engine seen with one of its adapters: a model of its own, `BASE:ADAPTER`, that the base's engine computes.

Owns nothing: closing, stepping and counting are the engine's, whatever process it runs in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.serving.protocol import EngineProtocol
from engine.serving.request_stream import RequestStream
from engine.types.model_info import EngineStats, ModelInfo, TokenizerInfo
from engine.types.requests import GenerationRequest, PreparedRequest, TokenizedPrompt

__all__ = ["AdapterView", "views"]


def views(engine: EngineProtocol) -> Mapping[str, EngineProtocol]:
    """Return an engine's adapters as models of their own, by id."""
    return {info.id: AdapterView(engine, name, info) for name, info in engine.info.adapters.items()}


class AdapterView(EngineProtocol):
    """An engine whose requests are computed with one adapter. All views of an engine share its queue and its steps."""

    def __init__(self, engine: EngineProtocol, adapter: str, info: ModelInfo) -> None:
        """adapter: its name in the engine; info: of the model with it."""
        self._engine, self._adapter, self._info = engine, adapter, info

    @property
    def info(self) -> ModelInfo:
        return self._info

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Prepare a request for the adapter, whatever adapter it names."""
        return await self._engine.prepare(replace(request, adapter=self._adapter))

    async def tokenize(self, request: GenerationRequest) -> TokenizedPrompt:
        return await self._engine.tokenize(replace(request, adapter=self._adapter))

    async def detokenize(self, tokens: Sequence[int], group: str = "") -> str:
        return await self._engine.detokenize(tokens, group)

    async def tokenizer(self) -> TokenizerInfo:
        return await self._engine.tokenizer()

    def submit(self, request: PreparedRequest) -> RequestStream:
        """Queue a prepared request. Raises ValueError, too, if it was prepared for another adapter."""
        if request.adapter != self._adapter:
            raise ValueError(f"the request was prepared for {request.adapter or 'no adapter'}, not {self._adapter}")
        return self._engine.submit(request)

    def token_text(self, token_id: int) -> str:
        return self._engine.token_text(token_id)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def step_bytes(self) -> Mapping[str, int]:
        return self._engine.step_bytes

    def close(self) -> bool:
        return self._engine.close()

    def __getattr__(self, name: str) -> Any:
        """Read what is not said here from the engine: it may do more than the protocol asks for."""
        return getattr(self._engine, name)

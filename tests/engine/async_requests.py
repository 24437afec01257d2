"""Requests to an engine on an event loop, for tests of what serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from engine import ChatMessage, EngineProtocol, GenerationRequest, RequestOutput


def request(name: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(request_id=name, messages=(ChatMessage("user", "hello"),), sampling=sampling)


async def collect(engine: EngineProtocol, wanted: GenerationRequest) -> list[RequestOutput]:
    return [output async for output in engine.submit(await engine.prepare(wanted))]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 120))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(12000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def in_group(name: str, group: str, **sampling: Any) -> GenerationRequest:
    return replace(request(name, **sampling), group=group)

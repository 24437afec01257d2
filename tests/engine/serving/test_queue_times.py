"""How long requests wait for their first step: told once, on the first output, and nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, strategies as st

from engine import AsyncEngine, Engine, GenerationRequest, ModelConfig, RequestOutput, Usage
from engine.loading.loader import load
from engine.serving.waiting.queue_times import QueueTimes
from engine.types.messages import ChatMessage


def output(name: str) -> RequestOutput:
    return RequestOutput(name, (), Usage(0, 0))


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["arrive", "begin", "output", "abort"]), st.sampled_from("abc"), st.integers(1, 5)),
        max_size=60,
    )
)
def test_against_a_slow_reference(events: list[tuple[str, str, int]]) -> None:
    """Requests arrive, begin in a step, have outputs and are aborted, in any order that an engine has."""
    times, now = QueueTimes(), 0.0
    queued: dict[str, float] = {}
    running: dict[str, float | None] = {}
    for event, name, pause in events:
        now += pause
        if event == "arrive" and name not in queued and name not in running:
            queued[name] = now
            times.arrive(name, now)
        elif event == "begin" and name in queued:
            running[name] = now - queued.pop(name)
            times.begin(now, lambda: list(queued))
        elif event == "output" and name in running:
            [told] = times.told([output(name)])
            assert told.queued_seconds == running[name]
            running[name] = None
        elif event == "abort":
            queued.pop(name, None)
            running.pop(name, None)
            times.forget(name)
    assert set(times._arrived) == set(queued)
    assert set(times._waited) == {name for name, waited in running.items() if waited is not None}


def test_late_requests_are_dropped_and_named() -> None:
    times = QueueTimes()
    times.arrive("old", 1.0)
    times.arrive("new", 5.0)
    assert times.late(7.0, 3.0) == ["old"]
    assert times.late(7.0, 3.0) == []


def test_an_engine_tells_it_once(tiny: Callable[[str], Path]) -> None:
    """On the first output of each request, also of those that waited for others."""
    config = ModelConfig(
        id="tiny",
        path=tiny("qwen3"),
        cache_size="8MiB",
        context_length=64,
        max_sequences=1,
        threads=1,  # type: ignore[arg-type]
    )
    engine = AsyncEngine(Engine(load(config)))

    async def one(name: str) -> list[float | None]:
        messages = (ChatMessage(role="user", content="Hi"),)
        sampling = {"max_tokens": 3, "ignore_eos": True, "seed": 1}
        request = await engine.prepare(GenerationRequest(request_id=name, messages=messages, sampling=sampling))
        return [output.queued_seconds async for output in engine.submit(request)]

    async def main() -> None:
        for first, *others in await asyncio.gather(*(one(f"r{i}") for i in range(3))):
            assert first is not None
            assert first >= 0.0
            assert others == [None] * len(others)

    try:
        asyncio.run(main())
    finally:
        engine.close()

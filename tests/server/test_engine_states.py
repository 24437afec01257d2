"""What a client and a load balancer see of a real engine that is loading, stuck, short of memory, or dead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, begin
from stepping import Steps

from engine import AsyncEngine, ModelConfig, Registry, fingerprint_of
from server.app import create_app

BOUND = 60.0
HELLO = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 3, "ignore_eos": True, **fields}


async def get(app: Any, path: str) -> Answer:
    return await begin(app, path=path).ended(BOUND)


def test_a_ready_server_says_what_it_serves(registry: Registry, engine: AsyncEngine) -> None:
    app = create_app(registry)

    async def main() -> None:
        ready = await get(app, "/health/ready")
        assert (ready.status, ready.json) == (200, {"status": "ready", "models": {"tiny": "ready"}})
        model = (await get(app, "/v1/models/tiny")).json
        reply = (await begin(app, chat()).ended(BOUND)).json
        assert model["system_fingerprint"] == reply["system_fingerprint"]
        assert (model["id"], model["state"], model["context_length"]) == ("tiny", "ready", 128)
        assert model["reproducible"]["holds"] is True
        assert fingerprint_of(model.pop("fingerprint_parts"), "vb-") == model["system_fingerprint"]
        assert fingerprint_of(model.pop("default_parts"), "vd-") == model["defaults_fingerprint"]
        assert (await get(app, "/v1/models")).json["data"] == [model]

    asyncio.run(main())


def test_a_step_that_does_not_end_makes_it_not_ready_and_its_end_ready_again(
    registry: Registry, engine: AsyncEngine, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(registry)
    monkeypatch.setattr(engine, "_stall_timeout", 0.02)

    async def main() -> None:
        exchange = begin(app, chat())
        await exchange.until(lambda: engine.stats().stalled, BOUND)
        answer = await get(app, "/health/ready")
        assert answer.status == 503
        assert answer.json["models"]["tiny"].startswith("stalled")
        assert (await get(app, "/health/live")).status == 200
        monkeypatch.setattr(engine, "_stall_timeout", 60)
        steps.release()
        assert (await exchange.ended(BOUND)).status == 200
        assert (await get(app, "/health/ready")).status == 200

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_memory_that_runs_out_fails_one_request_and_not_the_server(
    registry: Registry, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    app = create_app(registry)
    forward, failures = engine.engine._forward, []

    def short_of_memory(schedule: Any) -> Any:
        if not failures:
            failures.append(schedule)
            raise MemoryError("tried to allocate 7 GiB")
        return forward(schedule)

    async def main() -> None:
        before = (await begin(app, chat()).ended(BOUND)).json["choices"]
        monkeypatch.setattr(engine.engine, "_forward", short_of_memory)
        answer = await begin(app, chat(stream=stream)).ended(BOUND)
        assert (answer.status, answer.error["code"]) == (503, "out_of_memory")
        assert "7 GiB" in answer.error["message"]
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("5", "false")
        assert (await begin(app, chat()).ended(BOUND)).json["choices"] == before

    asyncio.run(main())


# -- an engine that dies; each test has its own ----------------------------------------------------------------------


@pytest.fixture
def mortal(tiny: Callable[[str], Path]) -> Iterator[Registry]:
    configs = [
        ModelConfig(id="tiny", path=tiny("qwen3"), cache_size="8MiB", context_length=128, threads=1),  # type: ignore[arg-type]
        ModelConfig(id="bad/one", path=Path("/nonexistent/checkpoint")),
    ]
    registry = Registry(configs)
    yield registry
    registry.close()


def test_from_loading_to_dead(mortal: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """One life: loading, one entry failed and one ready, then a step that breaks; each state is told to everybody. And
    the next life, with the same replies."""
    app = create_app(mortal)

    def broken() -> Any:
        raise RuntimeError("the card fell off the bus")

    async def main() -> None:
        answer = await begin(app, chat()).ended(BOUND)
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "model_loading", "5")
        assert "x-should-retry" not in answer.headers, "trying again does help"
        assert (await get(app, "/health/ready")).status == 503
        assert (await get(app, "/v1/models/tiny")).json["state"] == "waiting"

        mortal.start()
        await asyncio.get_running_loop().run_in_executor(None, mortal.wait)
        answer = await begin(app, chat(model="bad/one")).ended(BOUND)
        assert (answer.status, answer.error["code"], answer.headers["x-should-retry"]) == (503, "engine_dead", "false")
        assert "/nonexistent/checkpoint" in answer.error["message"]
        assert (await get(app, "/v1/models/bad/one")).json["state"] == "failed"
        first = await begin(app, chat()).ended(BOUND)

        engine = mortal.get("tiny")
        steps = Steps(engine, monkeypatch)
        streaming, whole = begin(app, chat(stream=True, max_tokens=50)), begin(app, chat(max_tokens=50))
        steps.grant(4)
        await streaming.until(lambda: len(streaming.messages) > 1 and steps.taken == 4, BOUND)
        monkeypatch.setattr(engine.engine, "step", broken)
        steps.release()
        answer = await whole.ended(BOUND)
        assert (answer.status, answer.error["code"]) == (503, "engine_dead")
        assert "fell off the bus" in answer.error["message"]
        events = (await streaming.ended(BOUND)).events
        assert events[-1]["error"]["code"] == "engine_dead"
        assert "[DONE]" not in events
        ready = await get(app, "/health/ready")
        assert ready.status == 503
        assert "fell off the bus" in ready.json["models"]["tiny"]
        assert ready.json["models"]["tiny"].startswith("dead")
        assert (await get(app, "/health/live")).status == 200
        again = await begin(app, chat()).ended(BOUND)
        assert again.json["choices"] == first.json["choices"], "it is loaded again, and says the same"

    asyncio.run(main())


def test_closing_the_registry_ends_what_is_under_way(mortal: Registry) -> None:
    """A stop must not leave a client waiting for an answer that never comes."""
    app = create_app(mortal)
    mortal.start()
    mortal.wait()

    async def main() -> None:
        exchange = begin(app, chat(max_tokens=100, n=4))
        await exchange.until(lambda: mortal.get("tiny").stats().running > 0, BOUND)
        await asyncio.get_running_loop().run_in_executor(None, mortal.close)
        answer = await exchange.ended(BOUND)
        assert (answer.status, answer.error["code"]) == (503, "engine_dead")
        assert "shutting down" in answer.error["message"]

    asyncio.run(main())

"""A real engine on a tiny model, loaded once for all tests that need one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import AsyncEngine, ModelConfig, Registry


@pytest.fixture(scope="session")
def registry(tiny: Callable[[str], Path]) -> Iterator[Registry]:
    """One real model, `tiny`, loaded and ready: 4 sequences at once, 4 requests waiting, a context of 128 tokens."""
    config = ModelConfig(
        id="tiny",
        path=tiny("qwen3"),
        cache_size="8MiB",  # type: ignore[arg-type]
        context_length=128,
        max_sequences=4,
        max_queue=4,
        max_batch_tokens=32,
        max_choices=4,
        threads=1,  # two that wait for each other cost more than they save on a model this small
    )
    registry = Registry([config])
    registry.start()
    registry.wait()
    yield registry
    registry.close()


@pytest.fixture
def engine(registry: Registry) -> Iterator[AsyncEngine]:
    """The engine behind it. A test must leave it as it found it: alive, idle, every block free."""
    engine = registry.get("tiny")
    yield engine
    stats = engine.stats()
    assert stats.alive
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.blocks_free == stats.blocks_total


class Steps:
    """Holds the engine before each step until a test grants it: what happens "within one step" can be counted."""

    def __init__(self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        self._permits = threading.Semaphore(0)
        self._free = False
        step = engine._core.step

        def held() -> Any:
            if not self._free:
                self._permits.acquire(timeout=20)
            self.taken += 1
            return step()

        monkeypatch.setattr(engine._core, "step", held)

    def grant(self, count: int = 1) -> None:
        """Let the engine take `count` steps when it has work; returns at once."""
        self._permits.release(count)

    def release(self) -> None:
        """Hold it no longer."""
        self._free = True
        self._permits.release()


@pytest.fixture
def steps(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    steps = Steps(engine, monkeypatch)
    yield steps
    steps.release()
    deadline = time.monotonic() + 5
    while engine.stats().running or engine.stats().waiting:
        assert time.monotonic() < deadline, "the engine is still busy"
        time.sleep(0.002)

"""A real engine on a tiny model, loaded once for all tests that need one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ledger_for_tests import WITH_POSTGRES, Clock, empty_postgres
from stepping import Steps

from engine import AsyncEngine, ModelConfig, Registry
from server.ledger.store import Ledger


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a ledger in a file is."""
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def file_url(file: Path) -> str:
    return f"sqlite:///{file}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=WITH_POSTGRES)])
def url(request: pytest.FixtureRequest, file_url: str) -> str:
    """Of an empty database: SQLite's, and PostgreSQL's where there is one."""
    return file_url if request.param == "sqlite" else empty_postgres()


@pytest.fixture
def ledger(url: str, clock: Clock) -> Iterator[Ledger]:
    made = Ledger(url, clock)
    yield made
    made.close()


@pytest.fixture
def file_ledger(file_url: str, clock: Clock) -> Iterator[Ledger]:
    """One in a file, for what happens to files."""
    made = Ledger(file_url, clock)
    yield made
    made.close()


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


@pytest.fixture
def steps(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    steps = Steps(engine, monkeypatch)
    yield steps
    steps.release()
    deadline = time.monotonic() + 60
    while engine.stats().running or engine.stats().waiting:
        assert time.monotonic() < deadline, "the engine is still busy"
        time.sleep(0.002)

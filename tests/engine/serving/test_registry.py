"""The registry with engines that a test opens: who waits, who is told what, what is closed. No model is computed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import (
    EngineDead,
    LoadError,
    LoadProgress,
    ModelConfig,
    ModelInUse,
    ModelLoading,
    ModelNotFound,
    NoRoom,
    NotEnoughMemory,
    Outline,
    QueueFull,
    Registry,
    VerbatimError,
)
from engine.serving.models import table as rules

GIB = 2**30


class FakeEngine:
    def __init__(self, name: str, on_death: Callable[[VerbatimError], None]) -> None:
        self.info = SimpleNamespace(id=name, weight_bytes=GIB, max_requests=9, adapters={})
        self.step_bytes = {"cuda:0": 7}
        self.closed = False
        self.die = on_death

    def stats(self) -> Any:
        return SimpleNamespace(resident_bytes=2 * GIB, alive=True, stalled=False)

    def close(self) -> bool:
        self.closed = True
        return True


class Opener:
    """Opens fake engines: at once, or when `gate` is set; `faults` are raised first, one after the other."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.faults: list[Exception] = []
        self.opened: list[FakeEngine] = []
        self.begun: list[str] = []
        self.beside: list[Sequence[object]] = []

    def __call__(
        self, config: ModelConfig, *, pull: bool, progress: Any, beside: Sequence[object], on_death: Any
    ) -> Any:
        self.begun.append(config.id)
        self.beside.append(beside)
        while not self.gate.wait(0.005):
            progress(LoadProgress(text="reading", bytes_read=3, total_bytes=9))
        if self.faults:
            raise self.faults.pop(0)
        self.opened.append(FakeEngine(config.id, on_death))
        return self.opened[-1]

    @property
    def living(self) -> list[str]:
        return [engine.info.id for engine in self.opened if not engine.closed]


class Memory:
    """Every model needs 2 GiB; `room` is what is free without any."""

    def __init__(self, opener: Opener) -> None:
        self.room = 100
        self.opener = opener

    def free(self) -> int:
        return (self.room - 2 * len(self.opener.living)) * GIB

    def outline(self, config: ModelConfig) -> Outline:
        return Outline(config.id, 1, "FakeForCausalLM", GIB, 2 * GIB)


def entry(name: str, load: Any = "on_demand", isolation: Any = "thread", **fields: Any) -> ModelConfig:
    return ModelConfig(id=name, path=Path("/models", name), load=load, isolation=isolation, **fields)


@pytest.fixture
def opener() -> Opener:
    return Opener()


@pytest.fixture
def memory(opener: Opener) -> Memory:
    return Memory(opener)


@pytest.fixture
def made(opener: Opener, memory: Memory) -> Iterator[Callable[..., Registry]]:
    registries: list[Registry] = []

    def make(*configs: ModelConfig, **options: Any) -> Registry:
        registries.append(Registry(configs, open=opener, memory=memory, **options))
        registries[-1].start()
        return registries[-1]

    yield make
    opener.gate.set()
    for registry in registries:
        assert registry.close()


ENOUGH = 60  # seconds: not a goal, only an end


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(ENOUGH):
            return await work

    return asyncio.run(bounded())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def state(registry: Registry, name: str) -> str:
    return registry.status(name).state


def test_requests_wait_for_one_load_and_use_one_engine(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a"))

    async def main() -> None:
        leases = await asyncio.gather(*(registry.acquire("a") for _ in range(5)))
        assert len({id(lease.engine) for lease in leases}) == 1
        assert opener.begun == ["a"]
        with pytest.raises(ModelInUse):
            await registry.unload("a")
        for lease in leases:
            lease.release()
            lease.release()  # twice is once
        assert (await registry.unload("a")).state == "unloaded"

    run(main())
    assert opener.living == []


def test_whoever_gives_up_does_not_end_the_load(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a"))
    opener.gate.clear()

    async def main() -> None:
        asked = [asyncio.ensure_future(registry.acquire("a")) for _ in range(2)]
        await asyncio.to_thread(until, lambda: registry.status("a").progress is not None)
        status = registry.status("a")
        assert (status.state, status.detail, status.users) == ("loading", "reading", 2)
        assert status.progress == LoadProgress(text="reading", bytes_read=3, total_bytes=9)
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        opener.gate.set()
        await asyncio.to_thread(until, lambda: state(registry, "a") == "ready")
        (await registry.acquire("a")).release()

    run(main())
    assert opener.begun == ["a"]
    assert registry.status("a").users == 0


def test_no_request_waits_longer_than_it_may(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a", max_load_seconds=0.02))
    opener.gate.clear()
    with pytest.raises(ModelLoading, match="not loaded after"):
        run(registry.acquire("a"))
    opener.gate.set()
    until(lambda: state(registry, "a") == "ready")


def test_only_so_many_wait(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a", max_sequences=1, max_queue=1))
    opener.gate.clear()

    async def main() -> None:
        asked = [asyncio.ensure_future(registry.acquire("a")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await registry.acquire("a")
        opener.gate.set()
        for lease in await asyncio.gather(*asked):
            lease.release()

    run(main())


def test_all_who_wait_are_told_why_it_failed(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a"))
    opener.faults = [LoadError("a: is damaged"), RuntimeError("odd")]

    async def main() -> None:
        told = await asyncio.gather(*(registry.acquire("a") for _ in range(3)), return_exceptions=True)
        assert [str(one) for one in told] == ["a could not be loaded: is damaged"] * 3
        with pytest.raises(EngineDead, match="damaged"):
            await registry.acquire("a")
        assert opener.begun == ["a"], "a request does not try again"
        with pytest.raises(EngineDead, match="RuntimeError: odd"):
            await registry.load("a")
        assert (await registry.load("a")).state == "ready", "somebody who manages the server does"

    run(main())


def test_a_refusal_says_what_is_needed_and_who_has_it(made: Callable[..., Registry], memory: Memory) -> None:
    registry = made(entry("a"), entry("b"))
    memory.room = 3

    async def main() -> None:
        lease = await registry.acquire("a")
        with pytest.raises(NoRoom, match=r"b needs 2.0 GiB of memory, 1.0 GiB are free; loaded: a \(2.0 GiB, 1 req"):
            await registry.acquire("b")
        assert state(registry, "b") == "unloaded"
        lease.release()
        (await registry.acquire("b")).release()
        assert [state(registry, name) for name in "ab"] == ["unloaded", "ready"]

    run(main())


def test_memory_that_runs_out_makes_an_idle_one_leave(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a"), entry("b"))

    async def main() -> None:
        (await registry.acquire("a")).release()
        opener.faults = [NotEnoughMemory("b: too little", needed=9, free=3)]
        (await registry.acquire("b")).release()

    run(main())
    assert opener.begun == ["a", "b", "b"]
    assert opener.living == ["b"]


def test_at_start_side_by_side_with_what_is_served(made: Callable[..., Registry], opener: Opener) -> None:
    opener.gate.clear()
    said: list[str] = []
    registry = made(entry("a", "at_start"), entry("b"), entry("c", "at_start"), on_progress=said.append)
    with pytest.raises(ModelLoading):
        run(registry.acquire("a"))
    opener.gate.set()
    registry.wait()
    assert opener.begun == ["a", "c"]
    assert [list(beside) for beside in opener.beside] == [[], [{"cuda:0": 7}]]
    assert [one.state for one in registry.list()] == ["ready", "unloaded", "ready"]
    assert [line for line in said if "ready" in line] == ["a: ready", "c: ready"]
    until(lambda: registry.status("b").outline is not None)
    assert registry.status("a").memory_bytes == 2 * GIB


def test_a_model_that_dies_is_loaded_again(
    made: Callable[..., Registry], opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "PAUSES", (0.01, 0.02))
    registry = made(entry("a", "at_start"))
    registry.wait()
    for _ in range(2):
        lease = run(registry.acquire("a"))
        lease.engine.die(EngineDead("signal 9"))
        assert state(registry, "a") in ("dead", "waiting", "loading", "ready")
        (run(registry.acquire("a"))).release()
        lease.release()
    opener.opened[-1].die(EngineDead("signal 9"))
    with pytest.raises(EngineDead, match="died 3 times: signal 9"):
        run(registry.acquire("a"))
    until(lambda: opener.living == [])
    opener.opened[0].die(EngineDead("an old one"))
    assert run(registry.load("a")).state == "ready"
    opener.opened[0].die(EngineDead("an old one"))
    assert state(registry, "a") == "ready", "what an engine says that has long left is not believed"


def test_idle_models_leave(made: Callable[..., Registry], opener: Opener) -> None:
    said: list[str] = []
    registry = made(entry("a", idle_seconds=0.05), on_progress=said.append)
    lease = run(registry.acquire("a"))
    time.sleep(0.1)
    assert state(registry, "a") == "ready"
    lease.release()
    until(lambda: state(registry, "a") == "unloaded")
    assert "a: unloaded after 0.05 s without a request" in said
    assert opener.living == []


def test_unload_waits_for_requests_as_long_as_it_is_told(made: Callable[..., Registry]) -> None:
    registry = made(entry("a"))

    async def main() -> None:
        lease = await registry.acquire("a")
        with pytest.raises(ModelInUse):
            await registry.unload("a", 0.1)
        asyncio.get_running_loop().call_later(0.1, lease.release)
        assert (await registry.unload("a", 5)).state == "unloaded"
        with pytest.raises(ModelNotFound):
            await registry.unload("b")

    run(main())


def test_a_changed_entry_is_replaced_while_it_serves(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a", "at_start"), entry("gone", "at_start"))
    registry.wait()
    lease = run(registry.acquire("a"))
    gone = run(registry.acquire("gone"))
    registry.apply([entry("a", "at_start", max_sequences=2)], None)
    until(lambda: len(opener.opened) == 3)
    until(lambda: run(_engine(registry, "a")) is not lease.engine)
    old: Any = lease.engine
    assert not old.closed
    lease.release()
    until(lambda: old.closed)
    with pytest.raises(ModelNotFound):
        registry.status("gone")
    assert opener.living == ["gone", "a"]
    gone.release()
    until(lambda: opener.living == ["a"])


async def _engine(registry: Registry, name: str) -> object:
    with await registry.acquire(name) as lease:
        return lease.engine


def test_a_load_that_is_not_wanted_any_more_ends(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a", "at_start"), entry("b", "at_start"))
    registry.wait()
    opener.gate.clear()
    registry.apply([entry("a", "at_start"), entry("b", "at_start"), entry("c", "at_start")], None)
    until(lambda: opener.begun[-1:] == ["c"])
    registry.apply([entry("a", "at_start"), entry("b", "at_start")], None)
    until(lambda: not registry._loaders)
    assert opener.living == ["a", "b"]


def test_close_ends_loads_and_tells_who_waits(made: Callable[..., Registry], opener: Opener) -> None:
    registry = made(entry("a"), entry("b"))
    run(registry.load("b"))
    opener.gate.clear()

    async def main() -> None:
        asked = asyncio.ensure_future(registry.acquire("a"))
        await asyncio.to_thread(until, lambda: state(registry, "a") == "loading")
        assert await asyncio.to_thread(registry.close)
        with pytest.raises(EngineDead, match="shutting down"):
            await asked
        with pytest.raises(EngineDead, match="shutting down"):
            await registry.acquire("b")

    run(main())
    assert opener.living == []


def test_an_unload_that_waits_ends_when_the_server_stops(made: Callable[..., Registry]) -> None:
    registry = made(entry("a"))

    async def main() -> None:
        lease = await registry.acquire("a")
        asked = asyncio.ensure_future(registry.unload("a", 60.0))
        await asyncio.sleep(0)
        assert await asyncio.to_thread(registry.close)
        lease.release()
        with pytest.raises(EngineDead, match="shutting down"):
            await asked

    run(main())


def test_nobody_waits_for_a_terminal_that_is_held(made: Callable[..., Registry], opener: Opener) -> None:
    """Control-S, or a pager that is not read on."""
    held, reached = threading.Event(), threading.Event()

    def say(text: str) -> None:
        if "by request" in text:
            reached.set()
            held.wait(120)

    registry = made(entry("a"), entry("b", "at_start"), on_progress=say)
    registry.wait()

    async def main() -> None:
        (await registry.acquire("a")).release()
        asked = asyncio.ensure_future(registry.unload("a"))
        await asyncio.to_thread(reached.wait, 60)
        looks = [lambda: registry.list(), lambda: registry.get("b"), lambda: run(registry.acquire("b")).release()]
        await asyncio.wait_for(asyncio.gather(*map(asyncio.to_thread, looks)), ENOUGH)
        held.set()
        await asked

    try:
        run(main())
    finally:
        held.set()


def test_models_come_and_go_after_the_system_had_no_thread(
    made: Callable[..., Registry], opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = made(entry("a"))
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name.startswith(("Load-", "Unload-")):
            raise RuntimeError("can't start new thread")
        start(thread)

    async def main() -> None:
        with monkeypatch.context() as changed:
            changed.setattr(threading.Thread, "start", none_left)
            with pytest.raises(EngineDead, match="can't start new thread"):
                await registry.acquire("a")
        assert (await registry.load("a")).state == "ready"
        with monkeypatch.context() as changed:
            changed.setattr(threading.Thread, "start", none_left)
            assert (await registry.unload("a")).state == "unloaded"
        (await registry.acquire("a")).release()

    run(main())
    assert opener.begun == ["a", "a"]


def test_many_come_and_go_and_nothing_stays(made: Callable[..., Registry], opener: Opener) -> None:
    """Requests for five models where two may be loaded, from many tasks: each is answered, or refused for want of room,
    by an engine that lives; afterwards nobody holds anything.

    As if in processes of their own: in this one, each unload would collect all objects of all tests before."""
    registry = made(*(entry(name, isolation="process") for name in "abcde"), max_loaded=2)
    served = 0

    async def client(number: int) -> None:
        nonlocal served
        for i in range(6):
            try:
                with await registry.acquire("abcde"[(number * 7 + i * 3) % 5]) as lease:
                    engine: Any = lease.engine
                    for _ in range(3):
                        await asyncio.sleep(0.001)
                        assert not engine.closed
                    served += 1
            except NoRoom:
                await asyncio.sleep(0.002)

    async def main() -> None:
        await asyncio.gather(*map(client, range(12)))

    run(main())
    assert served > 12
    until(lambda: len(opener.living) <= 2)
    assert all(status.users == 0 for status in registry.list())
    registry.apply([entry("z")], 1)
    until(lambda: opener.living == [])
    assert replace(registry.list()[0], outline=None).id == "z"

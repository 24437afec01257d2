"""A model's process: how it ends, what is told of it, and that nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from async_requests import collect, in_group, request, run, until
from broken_engines import break_processes

from engine import EngineDead, LoadError, LoadInterrupted, ModelConfig, ReplyFault, VerbatimError, open_engine
from engine.serving.client import EngineClient
from engine.serving.deaths import ended_words
from engine.serving.process import transport as process_transport

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")
Open = Callable[..., EngineClient]


@pytest.fixture
def open_process(tiny: Callable[[str], Path]) -> Iterator[Open]:
    """Opens engines in processes, and holds at the end that nothing of them is left."""
    before, threads = _descriptors(), set(threading.enumerate())  # other tests' engines may have the same names
    opened: list[EngineClient] = []
    pids: list[int] = []

    def open_one(**more: Any) -> EngineClient:
        given = {k: more.pop(k) for k in ("progress", "on_death") if k in more}
        entry: dict[str, Any] = {"id": "tiny", "path": tiny("qwen3"), "cache_size": "8MiB", "context_length": 512}
        engine = open_engine(ModelConfig(**{**entry, "isolation": "process", **more}), **given)
        assert isinstance(engine, EngineClient)
        opened.append(engine)
        pids.append(pid_of(engine))
        return engine

    yield open_one
    for engine in opened:
        assert engine.close(), "nothing is ever left behind"
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    left = set(threading.enumerate()) - threads
    assert not [t.name for t in left if t.name in ("engine-tiny", "to-tiny")]
    assert _descriptors() <= before


def pid_of(engine: EngineClient) -> int:
    pid = engine.stats().process_id
    assert pid is not None
    return pid


def _descriptors() -> int:
    gc.collect()
    return psutil.Process().num_fds()


async def everything(stream: Any) -> list[Any]:
    return [output async for output in stream]


def tokens(outputs: list[Any]) -> list[int]:
    return [t for o in outputs for d in o.deltas for t in d.token_ids]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-signal.SIGKILL, "was ended by signal 9 (SIGKILL), perhaps because memory ran out"),
        (-signal.SIGSEGV, "was ended by signal 11 (SIGSEGV), a fault in compiled code"),
        (-signal.SIGTERM, "was ended by signal 15 (SIGTERM)"),
        (-63, "was ended by signal 63"),
        (0, "ended by itself with status 0"),
        (3, "ended by itself with status 3"),
    ],
)
def test_an_end_is_told_in_words(status: int, words: str) -> None:
    assert ended_words(status) == words


def test_a_killed_model_ends_its_own_requests_and_no_others(open_process: Open) -> None:
    """Everybody who waits for it is told why; the other model's reply has the same bits as ever."""
    deaths: list[VerbatimError] = []
    doomed = open_process(on_death=deaths.append, max_sequences=2)
    spared = open_process(id="other")

    async def main() -> None:
        wanted = request("r", seed=3, max_tokens=300, ignore_eos=True)
        alone = await collect(spared, wanted)
        prepared = [await doomed.prepare(request(f"d{i}", seed=i, max_tokens=480, ignore_eos=True)) for i in range(4)]
        streams = [doomed.submit(one) for one in prepared]  # two of them wait
        other = spared.submit(await spared.prepare(wanted))
        await anext(streams[0])
        first = await anext(other)
        asked = [asyncio.ensure_future(doomed.prepare(request(f"p{i}"))) for i in range(6)]  # some wait for their turn
        await asyncio.sleep(0)
        os.kill(pid_of(doomed), signal.SIGKILL)
        ended = [(await everything(stream))[-1].error for stream in streams]
        late = await asyncio.gather(*asked, return_exceptions=True)
        told = f"the engine of tiny has stopped: its process {ended_words(-signal.SIGKILL)}"
        for error in (*ended, *(one for one in late if isinstance(one, BaseException))):
            assert isinstance(error, EngineDead)
            assert error.message == told
        with pytest.raises(EngineDead, match="SIGKILL"):
            await doomed.prepare(request("late"))
        with pytest.raises(EngineDead, match="SIGKILL"):
            doomed.submit(prepared[0])
        with pytest.raises(EngineDead, match="SIGKILL"):
            doomed.token_text(5)
        assert [error.message for error in deaths] == [told]
        stats = doomed.stats()
        assert (stats.alive, stats.stalled, stats.process_id, stats.resident_bytes) == (False, False, None, 0)
        assert [o.deltas for o in [first, *await everything(other)]] == [o.deltas for o in alone]
        assert spared.stats().alive

    run(main())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("step_raises", "has stopped: KeyError; see the log"),
        ("step_faults", "has stopped: its process was ended by signal 11 (SIGSEGV), a fault in compiled code"),
    ],
)
def test_a_fault_in_a_step_is_told_without_a_requests_words(
    open_process: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str, told: str
) -> None:
    break_processes(monkeypatch, fault)
    deaths: list[VerbatimError] = []
    engine = open_process(on_death=deaths.append)

    async def main() -> None:
        outputs = await everything(engine.submit(await engine.prepare(request("r", max_tokens=9, ignore_eos=True))))
        assert isinstance(outputs[-1].error, EngineDead)
        assert outputs[-1].error.message.endswith(told)
        with pytest.raises(EngineDead) as caught:
            await engine.prepare(request("late"))
        assert caught.value.message.endswith(told)

    run(main())
    assert len(deaths) == 1
    assert "SECRET" not in caplog.text
    if fault == "step_raises":
        assert "in step" in caplog.text, "the child's log says where"


@pytest.mark.slow
def test_a_step_that_does_not_end_is_reported_and_killed(open_process: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind, as a thread would be."""
    break_processes(monkeypatch, "step_never_ends")
    monkeypatch.setattr(process_transport, "LAST_STEP", 0.2)
    deaths: list[VerbatimError] = []
    engine = open_process(on_death=deaths.append, stall_timeout=0.3)

    async def main() -> None:
        stream = engine.submit(await engine.prepare(request("r", max_tokens=9, ignore_eos=True)))
        await until(lambda: engine.stats().stalled)
        assert engine.stats().alive
        assert await asyncio.to_thread(engine.close)
        assert (await everything(stream))[-1].error.message.endswith("the server is shutting down")

    run(main())
    assert deaths == [], "it was closed"


@pytest.mark.slow
def test_what_cannot_be_sent_ends_its_own_request(open_process: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    break_processes(monkeypatch, "outputs_cannot_be_sent")
    engine = open_process()

    async def main() -> None:
        wanted = [request(name, seed=1, max_tokens=40, ignore_eos=True) for name in ("one", "bad", "two")]
        found = await asyncio.gather(*(collect(engine, one) for one in wanted))
        assert isinstance(found[1][-1].error, ReplyFault)
        assert [len(tokens(outputs)) for outputs in found] == [40, 0, 40]
        await until(lambda: engine.stats().running == 0)
        with pytest.raises(Exception, match=r"(?i)pickle"):
            await engine.prepare(request("odd", logit_bias=threading.Lock()))
        assert (await collect(engine, request("after", max_tokens=2)))[-1].error is None
        await until(lambda: not engine.is_stepping)
        odd: Any = {"prompt_token_ids": threading.Lock()}
        sent = engine.submit(replace(await engine.prepare(request("late")), **odd))
        assert isinstance((await everything(sent))[-1].error, ReplyFault)
        assert not engine.is_stepping, "nothing was sent, so that nothing can stall"

    run(main())


@pytest.mark.slow
def test_heavy_prompts_of_one_key_do_not_hold_up_anothers_and_all_are_told_of_the_end(
    open_process: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The child has threads for three, whose turns the parent grants. What it logs is a record here."""
    break_processes(monkeypatch, "prepare_never_ends")
    engine = open_process()
    logged = caplog.handler.records

    async def main() -> None:
        for key in ("ada", "bob"):
            for i in range(4):
                asked.append(asyncio.ensure_future(engine.prepare(in_group(f"{key}{i}", key))))
            await asyncio.sleep(0)
        await until(lambda: len(logged) == 3)
        assert sorted(record.getMessage() for record in logged) == ["prepares ada0", "prepares ada1", "prepares bob0"]
        assert {(record.name, record.levelname) for record in logged} == {("verbatim.engine", "WARNING")}
        assert logged[0].fields == {"n": "1"}  # type: ignore[attr-defined]
        asked[2].cancel()
        assert await asyncio.wait_for(asyncio.to_thread(engine.token_text, 5), 60) == "#", "a lookup waits for nobody"
        os.kill(pid_of(engine), signal.SIGKILL)
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(error) for error in ended} == {EngineDead, asyncio.CancelledError}

    asked: list[asyncio.Future[Any]] = []
    run(main())


@pytest.mark.slow
def test_a_fault_in_preparing_is_no_death(
    open_process: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_processes(monkeypatch, "prepare_has_a_fault")
    engine = open_process()
    with pytest.raises(RuntimeError, match="LookupError"):
        run(engine.prepare(request("r")))
    assert "SECRET" not in caplog.text
    assert "in prepare" in caplog.text
    assert engine.stats().alive


# -- loading -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_says_the_same_as_in_a_thread(open_process: Open, tmp_path: Path) -> None:
    messages = []
    for isolation in ("thread", "process"):
        with pytest.raises(LoadError) as caught:
            open_process(path=tmp_path / "nothing", isolation=isolation)
        messages.append((type(caught.value), caught.value.message, caught.value.details))
    assert messages[0] == messages[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("load_is_killed", "tiny: while it was loaded, its process was ended by signal 9 (SIGKILL), perhaps because "),
        ("load_has_a_fault", "tiny: LookupError: not there."),
    ],
)
def test_a_process_that_ends_while_it_loads_is_a_load_error(
    open_process: Open, monkeypatch: pytest.MonkeyPatch, fault: str, told: str
) -> None:
    break_processes(monkeypatch, fault)
    with pytest.raises(LoadError) as caught:
        open_process()
    assert caught.value.message.startswith(told)
    assert isinstance(caught.value, LoadInterrupted) == (fault == "load_is_killed")


def test_who_gives_up_while_it_loads_leaves_no_process(open_process: Open) -> None:
    """Whatever `progress` raises; and until then it tells bytes and words."""
    told: list[Any] = []

    def progress(found: Any) -> None:
        told.append(found)
        if found.text == "self-test":
            raise KeyboardInterrupt

    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyboardInterrupt):
        open_process(progress=progress)
    assert {child.pid for child in psutil.Process().children()} <= before
    assert [found.text for found in told][-1] == "self-test"
    sizes = [(found.bytes_read, found.total_bytes) for found in told if found.total_bytes]
    assert sizes
    assert sizes == sorted(sizes)
    assert all(0 < read <= total for read, total in sizes)


@pytest.mark.slow
def test_no_process_can_be_started(open_process: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(LoadError, match=r"tiny: while it was loaded, its process cannot be started: .*nowhere"):
        open_process()


# -- the end of the parent ---------------------------------------------------------------------------------------------

PARENT = """
import signal, sys, threading, time
from engine import ModelConfig, open_engine
if __name__ == "__main__":
    opened = []
    thread = threading.Thread(target=lambda: opened.append(open_engine(ModelConfig(id="m", builtin="noise"))))
    thread.start()
    thread.join()  # the thread that has started it is gone, and it lives on
    time.sleep(0.5)
    print(opened[0].stats().process_id, opened[0].stats().alive, flush=True)
    if sys.argv[1] == "exit":
        sys.exit()
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "exit", "SIGINT to all"])
def test_no_model_outlives_its_parent(tmp_path: Path, how: str) -> None:
    """However it ends, with or without a word. What a terminal sends to all is for the parent alone."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid, alive = parent.stdout.readline().split()
        child = psutil.Process(int(pid))
        assert alive == "True"
        if how == "SIGINT to all":
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                child.send_signal(name)
            time.sleep(0.3)
            assert child.is_running()
            assert child.status() != psutil.STATUS_ZOMBIE
            assert os.getpgid(child.pid) != os.getpgid(parent.pid), "Ctrl-C does not even reach it"
            parent.kill()
        elif how != "exit":
            parent.send_signal(getattr(signal, how))
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child.pid) and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:  # nobody reaps orphans in some containers
                break
        time.sleep(0.05)
    else:
        assert not psutil.pid_exists(child.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_crash_of_a_model_leaves_no_dump_and_the_terminal_is_not_its_own(open_process: Open) -> None:
    pid = pid_of(open_process())
    assert re.search(r"Max core file size +0 ", Path(f"/proc/{pid}/limits").read_text())
    assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0
    assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
    assert os.readlink(f"/proc/{pid}/fd/1") == os.readlink(f"/proc/{pid}/fd/2")


@pytest.mark.sweep
def test_coming_and_going_leaves_nothing(open_process: Open) -> None:
    """Ten times loaded, used and closed: the memory is given back, whole."""
    resident: list[int] = []
    threads, children = threading.active_count(), len(psutil.Process().children(recursive=True))
    for i in range(10):
        engine = open_process()
        assert run(collect(engine, request(f"r{i}", seed=1, max_tokens=20)))[-1].error is None
        assert engine.close()
        assert threading.active_count() == threads
        assert len(psutil.Process().children(recursive=True)) == children
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] - resident[2] < 2 << 20, resident

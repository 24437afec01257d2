"""What strangers sent is tried in a child: whatever it does there, one call is told and nobody else notices."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.confined import process as confined_module
from engine.confined.process import Confined, ConfinedError, ConfinedFault

HERE = "tests.engine.confined.test_confined"


# -- what the child runs ----------------------------------------------------------------------------------------------


def echo(value: Any) -> Any:
    return value


def spin(_: Any) -> None:
    while True:
        pass


def wait(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


def grow(_: Any) -> int:
    return len(bytearray(1 << 40))


def allocate_as_compiled_code_does(_: Any) -> None:
    os.write(2, b"memory allocation of 8589934592 bytes failed\n")
    os.abort()


def crash(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)


def read_nowhere(_: Any) -> None:
    ctypes.string_at(1)


def leave(status: int) -> None:
    os._exit(status)


def stack(_: Any) -> int:
    return threading.stack_size()


def much(count: int) -> str:
    return "x" * count


def talk(_: Any) -> str:
    print("{}" * 100)
    sys.stderr.write("!" * 1_000_000)
    return "said"


def missing(key: str) -> None:
    raise KeyError(key)


def made(argument: Any) -> list[Any]:
    return [argument, 0]


def look(argument: Any, kept: list[Any]) -> list[Any]:
    kept[1] += 1
    return [argument, *kept, os.getpid()]


def limits(_: Any) -> dict[str, Any]:
    return {"core": resource.getrlimit(resource.RLIMIT_CORE), "environment": sorted(os.environ)}


def loaded(_: Any) -> list[str]:
    return sorted({"torch", "transformers", "multiprocessing"} & set(sys.modules))


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    child = Confined("tests", seconds=0.5, memory_bytes=256 << 20, stack_bytes=64 << 20, at_once=3)
    yield child
    child.close()


@pytest.fixture(scope="module")
def patient() -> Iterator[Confined]:
    child = Confined("patient", seconds=60, memory_bytes=256 << 20)
    yield child
    child.close()


@pytest.mark.parametrize(
    ("function", "argument", "fault"),
    [
        ("spin", None, "took longer than 0.5 seconds"),
        ("wait", 60, "took longer than 2 seconds"),  # of the clock: it takes nothing of a processor
        ("crash", signal.SIGSEGV, "ended by SIGSEGV"),
        ("crash", signal.SIGKILL, "ended by SIGKILL"),
        ("read_nowhere", None, "ended by SIGSEGV"),
        ("leave", 3, "ended with status 3"),
        ("leave", 0, "ended without an answer"),
    ],
)
def test_a_fault_is_told_and_the_next_call_is_answered(
    confined: Confined, function: str, argument: Any, fault: str
) -> None:
    began = time.monotonic()
    with pytest.raises(ConfinedFault) as told:
        confined.call(f"{HERE}:{function}", argument)
    found = str(told.value)
    assert (found if function == "wait" else _plain(found, began)) == fault
    assert confined.call(f"{HERE}:echo", [function, None]) == [function, None]


SPUN = "took longer than 0.5 seconds"


def _plain(told: Any, began: float) -> Any:
    """A busy machine may give a call no half second of a processor within two, which is the other limit of `SPUN`."""
    late = told == "took longer than 2 seconds" and time.monotonic() - began >= 2
    return SPUN if late else told


@pytest.mark.parametrize(
    ("function", "argument", "fault"),
    [
        ("grow", None, "needed more than 256 MiB of memory"),
        ("allocate_as_compiled_code_does", None, "needed more than 256 MiB of memory"),
        ("much", 65 << 20, "had an answer of more than 64 MiB"),
    ],
)
def test_what_is_too_large_is_told(patient: Confined, function: str, argument: Any, fault: str) -> None:
    """With time to spare: how long it takes to fill memory is the machine's affair."""
    with pytest.raises(ConfinedFault) as told:
        patient.call(f"{HERE}:{function}", argument)
    assert str(told.value) == fault
    assert patient.call(f"{HERE}:echo", 1) == 1


@pytest.mark.parametrize(
    ("function", "argument", "kind", "message"),
    [
        ("missing", "é", "KeyError", "'é'"),
        ("made_up", None, "AttributeError", "made_up"),
        ("look", 1, "TypeError", "kept"),
    ],
)
def test_what_the_function_raises_is_named(
    confined: Confined, function: str, argument: Any, kind: str, message: str
) -> None:
    with pytest.raises(ConfinedError, match=message) as told:
        confined.call(f"{HERE}:{function}", argument)
    assert told.value.kind == kind


def test_any_json_goes_both_ways_whatever_its_size(confined: Confined) -> None:
    values: list[Any] = ["\ud800", "é\0", 2**70, None, {"": [1.5, True]}, "y" * 3_000_000]
    for value in values:
        assert confined.call(f"{HERE}:echo", value) == value
    assert len(confined.call(f"{HERE}:much", 20_000_000)) == 20_000_000
    assert confined.call(f"{HERE}:talk", None) == "said"


def test_the_stack_is_as_large_as_asked_for(confined: Confined) -> None:
    """What it is there for is shown with grammars, whose compiler needs it."""
    assert confined.call(f"{HERE}:stack", None) == 64 << 20


def test_callers_do_not_wait_for_each_other_and_a_fault_is_one_callers_own(confined: Confined) -> None:
    def call(job: tuple[str, Any]) -> Any:
        try:
            return confined.call(f"{HERE}:{job[0]}", job[1])
        except ConfinedFault as fault:
            return str(fault)

    jobs: list[tuple[str, Any]] = [("wait", 0.3), ("crash", 11), ("spin", None), *(("echo", i) for i in range(20))]
    began = time.monotonic()
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(call, jobs))
    assert [_plain(one, began) for one in answers] == ["awake", "ended by SIGSEGV", SPUN, *range(20)]


def test_what_is_kept_is_made_once_and_no_call_changes_it_for_the_next() -> None:
    child = Confined("kept", kept=(f"{HERE}:made", lambda: {"a": 1}))
    try:
        first, second = (child.call(f"{HERE}:look", n) for n in (1, 2))
        assert first[:3] == [1, {"a": 1}, 1]
        assert second[:3] == [2, {"a": 1}, 1]
        assert first[3] != second[3]
        [warm] = _children("kept")
        warm.kill()
        assert child.call(f"{HERE}:look", 3)[:3] == [3, {"a": 1}, 1], "a child that was ended is started again"
    finally:
        child.close()


def test_a_child_whose_end_shows_in_a_write_first_is_replaced() -> None:
    """The pipe to it may break before anybody has read that it has ended."""
    child = Confined("broken")
    try:
        child.call(f"{HERE}:echo", 0)
        assert child._child is not None
        assert child._child._process.stdin is not None
        child._child._process.stdin.close()
        assert child.call(f"{HERE}:echo", 1) == 1
    finally:
        child.close()


def test_a_child_that_is_ended_while_a_call_runs_is_replaced() -> None:
    child = Confined("ended")
    try:
        child.call(f"{HERE}:echo", 0)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(child.call, f"{HERE}:wait", 0.3)
            time.sleep(0.1)
            _children("ended")[0].kill()
            assert waiting.result(60) == "awake"
    finally:
        child.close()


def test_closing_ends_what_runs() -> None:
    child = Confined("closed", seconds=60)
    child.call(f"{HERE}:echo", 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(child.call, f"{HERE}:wait", 200)
        _until(lambda: len(_children("closed")) == 2)
        everybody = _children("closed")
        child.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(60)
    with pytest.raises(RuntimeError, match="closed"):
        child.call(f"{HERE}:echo", 0)
    _until(lambda: not any(map(_runs, everybody)))


def test_one_that_nobody_closes_ends_with_the_object() -> None:
    child = Confined("forgotten")
    child.call(f"{HERE}:echo", 0)
    [process] = _children("forgotten")
    del child
    _until(lambda: not _runs(process))


def _interruptible() -> None:
    """Let SIGINT end a new process: a shell that runs the tests in the background has it ignored, in children too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_process_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import threading, time; from engine.confined.process import Confined; c = Confined('orphan', seconds=60)\n"
        f"threading.Thread(target=c.call, args=('{HERE}:wait', 200), daemon=True).start()\n"
        f"threading.Thread(target=c.call, args=('{HERE}:spin', None), daemon=True).start()\n"
        "time.sleep(200)\n"
    )
    root = Path(__file__).resolve().parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL, preexec_fn=_interruptible
    )
    try:
        watched = psutil.Process(parent.pid)
        _until(lambda: len(watched.children(recursive=True)) == 3)
        everybody = watched.children(recursive=True)
        parent.send_signal(number)
        parent.wait(60)
        _until(lambda: not any(map(_runs, everybody)))
    finally:
        parent.kill()
        parent.wait()


def test_the_child_has_no_core_no_secrets_and_no_torch(confined: Confined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "hunter2")
    child = Confined("bare")
    try:
        found = child.call(f"{HERE}:limits", None)
        assert found["core"] == [0, 0]
        assert "DATABASE_PASSWORD" not in found["environment"]
    finally:
        child.close()
    code = "import sys, engine.confined.process; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_child_that_cannot_start_is_no_callers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    child = Confined("broken")
    with pytest.raises(RuntimeError, match="broken"):
        child.call(f"{HERE}:echo", 0)
    child.close()


def _children(name: str) -> list[psutil.Process]:
    """The warm child of this name and its trials."""
    return [
        child for child in psutil.Process().children(recursive=True) if f'"{name}"' in " ".join(child.cmdline()[:5])
    ]


def _runs(process: psutil.Process) -> bool:
    with_status: Callable[[], str] = process.status
    try:
        return process.is_running() and with_status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_many_threads_start_one_child() -> None:
    child = Confined("once")
    barrier = threading.Barrier(8)

    def call(i: int) -> Any:
        barrier.wait(60)
        return child.call(f"{HERE}:echo", i)

    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(call, range(8))) == list(range(8))
        assert len(_children("once")) == 1
    finally:
        child.close()


def test_a_child_that_somebody_has_stopped_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with a message that fits its pipe, nor with one that does not, nor at the end."""
    monkeypatch.setattr(confined_module, "START_SECONDS", 1.5)
    child = Confined("stopped", seconds=0.1)
    try:
        for size in (1, 1_000_000):
            child.call(f"{HERE}:echo", 0)
            _children("stopped")[0].suspend()
            assert child.call(f"{HERE}:echo", "x" * size) == "x" * size
        _children("stopped")[0].suspend()
    finally:
        child.close()
    assert not _children("stopped")


@pytest.mark.skipif(sys.platform != "linux", reason="no other system sets the limits of a process that runs")
def test_no_process_left_is_no_callers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Confined("full")
    try:
        child.call(f"{HERE}:echo", 0)
        [warm] = _children("full")
        files = resource.prlimit(warm.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(warm.pid, resource.RLIMIT_NOFILE, (3, files[1]))
        with pytest.raises(RuntimeError, match="no process can be started"):
            child.call(f"{HERE}:echo", 1)
        resource.prlimit(warm.pid, resource.RLIMIT_NOFILE, files)
        assert child.call(f"{HERE}:echo", 2) == 2
        assert _children("full") == [warm]
    finally:
        child.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RuntimeError, match=r"cannot be started: .*/nowhere"):
        Confined("nowhere").call(f"{HERE}:echo", 0)


@pytest.mark.parametrize(("function", "passing"), [("wait", True), ("spin", False), ("read_nowhere", False)])
def test_a_fault_says_whether_the_machine_may_be_to_blame(confined: Confined, function: str, passing: bool) -> None:
    with pytest.raises(ConfinedFault) as raised:
        confined.call(f"{HERE}:{function}", 60)
    assert raised.value.passing is passing


def test_a_system_without_limits_can_import_it() -> None:
    call = "from engine.confined.process import Confined; Confined('x').call('a:b', 0)"
    code = f"import sys; sys.modules['resource'] = None; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError: what strangers send is tried in a process")


def test_signals_that_the_caller_ignores_or_blocks_are_ours_all_the_same() -> None:
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); signal.signal(signal.SIGPROF, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF, signal.SIGCHLD])\n"
        "from engine.confined.process import Confined; c = Confined('signals', seconds=0.5)\n"
        f"assert c.call('{HERE}:echo', 1) == 1\nc.call('{HERE}:spin', 0)\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1].endswith("ConfinedFault: took longer than 0.5 seconds")


def test_a_system_without_such_processes_still_loads_templates() -> None:
    """Windows has no `resource` and no `os.fork`: the template's budget holds there, and grammars are refused."""
    code = """
import os, sys
sys.modules["resource"] = None
del os.fork
from engine.replies import expression_trial
from engine.loading.trials import template_trial
from engine.confined.process import Confined
template_trial.check("{{ messages[0].content }}", None, {})
expression_trial.check({"open_pattern": "(?:a|b|ab)*c"})
confined = Confined("none")
confined.start()
try:
    confined.call("json:loads", "1")
except RuntimeError as error:
    print(error)
confined.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "os.fork" in done.stdout

"""Functions of ours on what strangers sent, in a child process that may die of it. Knows nothing of grammars or models.

    caller ──call("module:function", argument)──▶ Confined ══ pipes, JSON ══ the warm child ──fork──▶ a trial
                                                                             imports, `kept`     clock, memory, stack

The warm child is a second interpreter that imports what is asked for once and forks for every call. Only the fork (a
trial) runs the function: within a bound on processor time and one on memory, on a stack of its own size. A trial that
crashes, hangs or grows costs its own call and nothing else, and nothing it did is left behind. What comes back is JSON
and never code. A trial ends with the warm child, and that one with the process that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

try:
    import resource
except ImportError:  # no POSIX system: importing works, a call says what is missing
    resource = None  # type: ignore[assignment]

__all__ = ["AVAILABLE", "Confined", "ConfinedError", "ConfinedFault", "serve"]

AVAILABLE: Final = hasattr(os, "fork") and resource is not None
"""Whether there are such processes on this system: not on Windows."""
WALL: Final = 4
"""A trial may last this many times its processor time: it shares the machine with the engine, and may just wait."""
START_SECONDS: Final = 60.0
"""For the warm child to import and to make what it keeps; it is ours, so this only ends what hangs."""
MAX_ANSWER: Final = 64 << 20  # bytes of JSON
_NO_MEMORY: Final = 77  # a trial's exit status
_HEAD: Final = 4  # bytes: how long a message is
_NUMBER: Final = 8  # bytes: which call an answer is of
_FAREWELL: Final = 2.0  # seconds for the warm child to end by itself
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_PASSED_ON: Final = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV")
_ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""One thread, or the child could not fork; one arena, or a limit on addresses would count what malloc only reserves."""
_START: Final = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from engine.confined import serve; serve()"


class ConfinedFault(Exception):
    """A trial that went beyond its limits or crashed: `took longer than 5 seconds`, `ended by SIGSEGV`.

    `passing`: the machine may be to blame (a real clock, a SIGKILL from outside): the same call may do well later.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class ConfinedError(Exception):
    """What the function raised in the trial; `kind` is the name of the exception's class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Confined:
    """A warm child process and the limits of what it runs. Starts with the first call; used from any thread.

    Args:
        name: shown in the list of processes.
        seconds: processor time of one call.
        memory_bytes: what one call may take beside what the warm child holds.
        stack_bytes: the stack that a function runs on.
        at_once: calls that run at the same time; others wait.
        kept: a function (`module:function`) and what makes its argument: called once in each warm child; every call's
            function gets the result as its second argument.
    """

    def __init__(
        self,
        name: str,
        *,
        seconds: float = 5.0,
        memory_bytes: int = 1 << 30,
        stack_bytes: int = 512 << 20,
        at_once: int = 4,
        kept: tuple[str, Callable[[], Any]] | None = None,
    ) -> None:
        self._limits = {"name": name, "seconds": seconds, "memory": memory_bytes, "stack": stack_bytes}
        self._wall = WALL * seconds
        self._kept = kept
        self._places = threading.Semaphore(at_once)
        self._lock = threading.Lock()  # of the three below
        self._child: _Child | None = None
        self._end: Callable[[], object] = _nothing
        self._closed = False

    def start(self) -> None:
        """Start the warm child if none runs; does not wait for it."""
        if AVAILABLE:
            self._running()

    def call(self, function: str, argument: Any) -> Any:
        """What `function` (`module:function`) returns for an argument; both are JSON.

        Raises:
            ConfinedFault: it went beyond a limit, or ended its process.
            ConfinedError: it raised.
            RuntimeError: the warm child does not start, or is closed, or this system has none.
        """
        if not AVAILABLE:
            raise RuntimeError(
                "what strangers send is tried in a process of its own, and this system cannot confine one (os.fork)"
            )
        with self._places:
            for _ in range(2):  # the warm child may have been ended from outside: once more with another
                child = self._running()
                with contextlib.suppress(_GoneError):
                    return child.call(function, argument, self._wall)
        raise RuntimeError(f"the process {self._limits['name']} ended twice, which no call should be able to cause")

    def close(self) -> None:
        """End the child and what it runs; those who wait for it get a RuntimeError. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._end()

    def _running(self) -> _Child:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the process {self._limits['name']} is closed")
            if self._child is None or self._child.gone:
                self._end()
                try:
                    self._child = _Child(self._limits, self._kept)
                except (
                    OSError,
                    TypeError,
                ) as error:  # no process or descriptor is left, or Python's own file is unknown
                    raise RuntimeError(f"the process {self._limits['name']} cannot be started: {error}") from error
                self._end = weakref.finalize(self, self._child.end)
            return self._child


class _GoneError(Exception):
    """The warm child has ended."""


class _Child:
    """One warm child, as the process that started it sees it."""

    def __init__(self, limits: dict[str, Any], kept: tuple[str, Callable[[], Any]] | None) -> None:
        environment = {k: v for k, v in os.environ.items() if k in _PASSED_ON or k.startswith(("LC_", "PYTHON"))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(limits), json.dumps([*map(str, sys.path)])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**environment, **_ENVIRONMENT},
        )  # fmt: skip
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self.gone = False
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()  # of `_waiting` and `gone`
        self._writing = threading.Lock()
        self._reader = threading.Thread(target=self._read, name=f"confined-{limits['name']}", daemon=True)
        self._reader.start()
        if kept is not None:
            self._writing.acquire()  # until it is sent: calls come after it
            keeper = threading.Thread(target=self._keep, args=kept, daemon=True)
            keeper.start()

    def call(self, function: str, argument: Any, seconds: float) -> Any:
        number = next(self._numbers)
        answer: Future[bytes] = Future()
        with self._lock:
            if self.gone:
                raise _GoneError
            self._waiting[number] = answer
        try:
            data = _framed(_json({"number": number, "function": function, "argument": argument}))
            with self._writing:
                self._write(data)
            found = json.loads(answer.result(seconds + START_SECONDS))
        except TimeoutError:  # the warm child ends every trial before that: it is the one that hangs
            self._abandon()
        except (ValueError, RecursionError):
            raise ConfinedFault("ended without an answer") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        if "fault" in found:
            raise ConfinedFault(found["fault"], passing=found["passing"])
        if "unable" in found:
            raise RuntimeError(found["unable"])
        if "error" in found:
            raise ConfinedError(*found["error"])
        return found["value"]

    def end(self) -> None:
        """Close the pipes, which ends the child, and wait for it."""
        assert self._process.stdin is not None
        if not self._writing.acquire(blocking=False):
            self._process.kill()  # whoever is writing notices: nothing could be closed under it
            self._writing.acquire()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._writing.release()
        try:
            self._process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._reader is not threading.current_thread():
            self._reader.join()

    def _abandon(self) -> NoReturn:
        """End a child that does not answer; the next call starts another."""
        self._process.kill()
        with self._lock:
            self.gone = True
        raise _GoneError from None

    def _keep(self, function: str, argument: Callable[[], Any]) -> None:
        try:
            self._write(_framed(_json({"keep": function, "argument": argument()})))
        except _GoneError:
            pass  # the reader has seen it
        except BaseException:
            self._process.kill()  # nobody may wait for what never comes
            raise
        finally:
            self._writing.release()

    def _write(self, data: bytes) -> None:
        """Send a message; a child that does not read (somebody has stopped it) is ended."""
        assert self._process.stdin is not None
        rest, late = memoryview(data), time.monotonic() + START_SECONDS
        try:
            poll = select.poll()
            poll.register(self._process.stdin, select.POLLOUT)
            while rest:
                if not poll.poll(max(0.0, late - time.monotonic()) * 1000):
                    self._abandon()
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(self._process.stdin.fileno(), rest) :]
        except (OSError, ValueError):  # its end of the pipe is gone, or ours is closed
            raise _GoneError from None

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            while len(head := stream.read(_HEAD + _NUMBER)) == _HEAD + _NUMBER:
                data = stream.read(int.from_bytes(head[:_HEAD]) - _NUMBER)
                with self._lock:
                    answer = self._waiting.pop(int.from_bytes(head[_HEAD:]), None)
                if answer is not None:
                    answer.set_result(data)
        with self._lock:
            self.gone = True
            waiting = [*self._waiting.values()]
            self._waiting.clear()
        for answer in waiting:
            answer.set_exception(_GoneError())


def _nothing() -> None:
    """No child has to be ended yet."""


def _json(message: object) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(_HEAD) + data


# -- in the child -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Trial:
    """One fork, as the warm child sees it."""

    number: int
    pid: int
    complaints: int  # a descriptor: what it writes on standard error, which never makes it wait
    deadline: float  # monotonic seconds
    answer: bytearray = field(default_factory=bytearray)
    fault: str = ""
    """Why it was killed."""
    late: bool = False
    """It was killed because of the clock."""


def serve() -> None:
    """Be the warm child: messages on standard input, answers on standard output, until the input ends."""
    limits = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to us, too; whoever started us decides
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGCHLD, signal.SIGPROF):  # what our caller ignores or blocks, we inherit
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # a print of some library is no answer
    _Warm(limits, out).run()


class _Warm:
    """The warm child's loop: forks, gathers answers, ends what is late."""

    def __init__(self, limits: dict[str, Any], out: int) -> None:
        self._limits = limits
        self._out = out
        self._kept: tuple[Any, ...] = ()
        self._trials: dict[int, _Trial] = {}  # by the descriptor that its answer comes from
        self._poll = select.poll()

    def run(self) -> None:
        self._poll.register(0, select.POLLIN)
        unread = bytearray()
        try:
            while True:
                for ready, _ in self._poll.poll(self._patience()):
                    data = os.read(ready, 1 << 20)
                    if ready in self._trials:
                        self._take(ready, data)
                    elif not data:
                        return
                    else:
                        unread += data
                        for message in _messages(unread):
                            self._obey(message)
                self._end_late()
        except BrokenPipeError:
            return  # nobody listens any more
        finally:
            for trial in self._trials.values():
                os.kill(trial.pid, signal.SIGKILL)

    def _patience(self) -> float | None:
        """Milliseconds until the first trial is late."""
        deadlines = [trial.deadline for trial in self._trials.values() if not trial.fault]
        return max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1 if deadlines else None

    def _end_late(self) -> None:
        for trial in self._trials.values():
            if not trial.fault and trial.deadline <= time.monotonic():
                trial.late = True
                self._kill(trial, f"took longer than {WALL * self._limits['seconds']:g} seconds")

    def _kill(self, trial: _Trial, fault: str) -> None:
        trial.fault = fault
        os.kill(trial.pid, signal.SIGKILL)

    def _obey(self, message: dict[str, Any]) -> None:
        if "keep" in message:
            self._kept = (_function(message["keep"])(message["argument"]),)
            return
        with contextlib.suppress(Exception):
            _function(message["function"])  # imported here, once; what is wrong with it is said in the trial
        gc.collect()
        gc.freeze()  # pages that a trial's garbage collector does not touch stay shared
        pipes: list[int] = []
        try:
            pipes += os.pipe()
            pipes += os.pipe()
            answer, to_answer, complaints, to_complaints = pipes
            os.set_blocking(to_complaints, False)
            warm = os.getpid()
            pid = os.fork()
        except OSError as error:  # a bound on processes, descriptors or memory: the next one may do better
            for descriptor in pipes:
                os.close(descriptor)
            self._reply(message["number"], _json({"unable": f"no process can be started to try it in: {error}"}))
            return
        if pid == 0:
            job = message["function"], (message["argument"], *self._kept)
            _try(job, self._limits, to_answer, to_complaints, warm)
        os.close(to_answer)
        os.close(to_complaints)
        deadline = time.monotonic() + WALL * self._limits["seconds"]
        self._trials[answer] = _Trial(message["number"], pid, complaints, deadline)
        self._poll.register(answer, select.POLLIN)

    def _take(self, descriptor: int, data: bytes) -> None:
        """A piece of a trial's answer; nothing: it has ended, since only it could write."""
        trial = self._trials[descriptor]
        if data:
            trial.answer += data if not trial.fault else b""
            if len(trial.answer) > MAX_ANSWER and not trial.fault:
                self._kill(trial, f"had an answer of more than {MAX_ANSWER >> 20} MiB")
            return
        self._poll.unregister(descriptor)
        del self._trials[descriptor]
        status = os.waitpid(trial.pid, 0)[1]
        os.set_blocking(trial.complaints, False)
        with contextlib.suppress(BlockingIOError):
            complaints = b""
            complaints = os.read(trial.complaints, 1 << 16)
        os.close(descriptor)
        os.close(trial.complaints)
        fault = trial.fault or self._fault(status, complaints)
        passing = trial.late or (not trial.fault and status == signal.SIGKILL)  # the system's, for want of memory
        self._reply(trial.number, _json({"fault": fault, "passing": passing}) if fault else trial.answer)

    def _reply(self, number: int, answer: bytes | bytearray) -> None:
        _write_all(self._out, _framed(number.to_bytes(_NUMBER) + answer))

    def _fault(self, status: int, complaints: bytes) -> str:
        """Why a trial ended without an answer; empty: it did not."""
        if status == 0:
            return ""
        number = os.waitstatus_to_exitcode(status)
        if number == _NO_MEMORY or b"memory allocation" in complaints:
            return f"needed more than {self._limits['memory'] / (1 << 20):g} MiB of memory"
        if number == -signal.SIGPROF:
            return f"took longer than {self._limits['seconds']:g} seconds"
        return f"ended by {signal.Signals(-number).name}" if number < 0 else f"ended with status {number}"


def _try(job: tuple[str, tuple[Any, ...]], limits: dict[str, Any], out: int, errors: int, warm: int) -> NoReturn:
    """Be a trial: run a function within the limits, write its answer, end."""
    import resource

    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(errors, 2)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != warm:
            os._exit(status)
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])  # its signal ends the process
        allowed = _addresses() + limits["memory"] + limits["stack"]
        with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
            resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        threading.stack_size(limits["stack"])
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(_answer(*job)))
        thread.start()
        thread.join()
        if answers and answers[0]:
            _write_all(out, answers[0])
            status = 0
        else:
            status = _NO_MEMORY
    except MemoryError:
        status = _NO_MEMORY
    finally:
        os._exit(status)


def _answer(function: str, arguments: tuple[Any, ...]) -> bytes:
    """What a function returns or raises, as a message; nothing where memory ran out."""
    try:
        try:
            return _json({"value": _function(function)(*arguments)})
        except MemoryError:
            return b""
        except BaseException as error:  # a panic of compiled code is no Exception
            return _json({"error": [type(error).__name__, str(error)]})
    except MemoryError:
        return b""


def _addresses() -> int:
    """Bytes of addresses that this process has mapped, where the system says so."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _messages(unread: bytearray) -> Iterator[dict[str, Any]]:
    """The whole messages at the beginning of what was read; they are taken out of it."""
    while len(unread) >= _HEAD and len(unread) >= (end := _HEAD + int.from_bytes(unread[:_HEAD])):
        message = json.loads(unread[_HEAD:end])
        del unread[:end]
        yield message


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]

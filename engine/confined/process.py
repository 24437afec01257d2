"""Run our own functions on untrusted input in a child process that may crash. Knows nothing of grammars or models.

    caller ──call("module:function", argument)──▶ Confined ══ pipes, JSON ══ the warm child ──fork──▶ a trial
                                                                             imports, `kept`     clock, memory, stack

The warm child is a second interpreter that imports each function once and forks for every call. Only the fork (a
trial) runs the function: within a bound on processor time and one on memory, on a stack of its own size. A trial that
crashes, hangs or grows fails its own call and nothing else, and leaves nothing behind. What comes back is JSON
and never code. A trial ends with the warm child, and that one with the process that started it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, NoReturn

from engine.confined.child import AVAILABLE, HEAD, NUMBER, WALL, as_json, framed

__all__ = ["AVAILABLE", "Confined", "ConfinedError", "ConfinedFault"]

START_SECONDS: Final = 60.0
"""Time for the warm child to import modules and make what it keeps; only a child that hangs takes longer."""
_FAREWELL: Final = 2.0  # seconds for the warm child to end by itself
_PASSED_ON: Final = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV")
_ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""One thread, or the child could not fork; one arena, or a limit on addresses would count what malloc only reserves."""
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from engine.confined.child import serve; serve()"
)


class ConfinedFault(Exception):
    """A trial went beyond its limits or crashed: `took longer than 5 seconds`, `ended by SIGSEGV`.

    `passing`: the cause may be the machine (real time, a SIGKILL from outside): the same call may succeed later.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class ConfinedError(Exception):
    """The function raised in the trial; `kind` is the name of the exception's class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Confined:
    """A warm child process and the limits of what it runs. Starts with the first call; used from any thread.

    Args:
        name: shown in the list of processes.
        seconds: processor time of one call.
        memory_bytes: what one call may take in addition to the warm child's memory.
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
        """Run `function` (`module:function`) in a trial and return its result; argument and result are JSON.

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
        """End the child and what it runs; callers that wait for it get a RuntimeError. Safe to call twice."""
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
            data = framed(as_json({"number": number, "function": function, "argument": argument}))
            with self._writing:
                self._write(data)
            found = json.loads(answer.result(seconds + START_SECONDS))
        except TimeoutError:  # the warm child ends every trial earlier, so the child itself hangs
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
            self._process.kill()  # the thread that is writing then fails, and lets go of the pipe
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
            self._write(framed(as_json({"keep": function, "argument": argument()})))
        except _GoneError:
            pass  # the reader has seen it
        except BaseException:
            self._process.kill()  # otherwise callers would wait for ever
            raise
        finally:
            self._writing.release()

    def _write(self, data: bytes) -> None:
        """Send a message; end the child if it does not read (a stopped process)."""
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
        except (OSError, ValueError):  # its end of the pipe is gone, or ours is closed: the reader may not know it yet
            self._abandon()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            while len(head := stream.read(HEAD + NUMBER)) == HEAD + NUMBER:
                data = stream.read(int.from_bytes(head[:HEAD]) - NUMBER)
                with self._lock:
                    answer = self._waiting.pop(int.from_bytes(head[HEAD:]), None)
                if answer is not None:
                    answer.set_result(data)
        with self._lock:
            self.gone = True
            waiting = [*self._waiting.values()]
            self._waiting.clear()
        for answer in waiting:
            answer.set_exception(_GoneError())


def _nothing() -> None:
    """Do nothing: no child has to be ended yet."""

"""Run the warm child's side of `engine.confined.process`: fork for each call, and let only the fork run the function.

Messages both ways are JSON behind their length; what comes back is data and never code. Imports nothing of the engine
except the modules of the functions it is asked to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

try:
    import resource
except ImportError:  # no POSIX system: importing works, and nothing starts a child
    resource = None  # type: ignore[assignment]

__all__ = ["AVAILABLE", "HEAD", "NUMBER", "WALL", "as_json", "end_with", "framed", "serve"]

AVAILABLE: Final = hasattr(os, "fork") and resource is not None
"""Whether this system can fork and limit processes; Windows cannot."""
WALL: Final = 4
"""A trial may last this many times its processor time: it shares the machine with the engine, and may just wait."""
MAX_ANSWER: Final = 64 << 20  # bytes of JSON
HEAD: Final = 4  # bytes: how long a message is
NUMBER: Final = 8  # bytes: which call an answer is of
_NO_MEMORY: Final = 77  # a trial's exit status
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def as_json(message: object) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(HEAD) + data


@dataclass(slots=True)
class _Trial:
    """One fork, as the warm child sees it."""

    number: int
    pid: int
    complaints: int  # the descriptor of its standard error, whose writes never block
    deadline: float  # monotonic seconds
    answer: bytearray = field(default_factory=bytearray)
    fault: str = ""
    """Why the warm child killed it; empty if it did not."""
    late: bool = False
    """Whether it was killed for taking too long."""


def end_with(parent: int) -> None:
    """Have this process killed when the thread that started it ends (Linux); end it now if `parent` is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def serve() -> None:
    """Run the warm child: messages on standard input, answers on standard output, until the input ends."""
    limits = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to this process, too; its parent decides
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGCHLD, signal.SIGPROF):  # undo what was inherited from the parent
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # so that no library prints into an answer
    _Warm(limits, out).run()


class _Warm:
    """The warm child's loop: forks, collects answers, ends late trials."""

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
        """Return the milliseconds until the first trial is late."""
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
            _function(message["function"])  # imported here, once; the trial reports what is wrong with it
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
        except OSError as error:  # processes, descriptors or memory ran out; a later call may succeed
            for descriptor in pipes:
                os.close(descriptor)
            self._reply(message["number"], as_json({"unable": f"no process can be started to try it in: {error}"}))
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
        """Read a piece of a trial's answer; an empty one means that the trial has ended, since only it could write."""
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
        self._reply(trial.number, as_json({"fault": fault, "passing": passing}) if fault else trial.answer)

    def _reply(self, number: int, answer: bytes | bytearray) -> None:
        _write_all(self._out, framed(number.to_bytes(NUMBER) + answer))

    def _fault(self, status: int, complaints: bytes) -> str:
        """Say why a trial ended without an answer; empty if it did not."""
        if status == 0:
            return ""
        number = os.waitstatus_to_exitcode(status)
        if number == _NO_MEMORY or b"memory allocation" in complaints:
            return f"needed more than {self._limits['memory'] / (1 << 20):g} MiB of memory"
        if number == -signal.SIGPROF:
            return f"took longer than {self._limits['seconds']:g} seconds"
        return f"ended by {signal.Signals(-number).name}" if number < 0 else f"ended with status {number}"


def _try(job: tuple[str, tuple[Any, ...]], limits: dict[str, Any], out: int, errors: int, warm: int) -> NoReturn:
    """Run a function within the limits, write its answer, and end this process: the fork's side of a trial."""
    import resource

    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(errors, 2)
        end_with(warm)
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
    """Return what a function returns or raises, as a message; nothing where memory ran out."""
    try:
        try:
            return as_json({"value": _function(function)(*arguments)})
        except MemoryError:
            return b""
        except BaseException as error:  # a panic of compiled code is no Exception
            return as_json({"error": [type(error).__name__, str(error)]})
    except MemoryError:
        return b""


def _addresses() -> int:
    """Return the bytes of addresses that this process has mapped, where the system says so."""
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
    """Take the whole messages from the beginning of what was read."""
    while len(unread) >= HEAD and len(unread) >= (end := HEAD + int.from_bytes(unread[:HEAD])):
        message = json.loads(unread[HEAD:end])
        del unread[:end]
        yield message


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]

"""`ProcessTransport`: an engine in a process of its own, as its parent sees it. Plain data on two pipes.

    callers ──▶ outbox ──writer──▶ pipe ══▶ the child (engine.serving.process.child)
                         keeper ◀─ pipe ◀══
            starts the child, reads, hands over events, waits for its end

The child is killed when the keeper ends (Linux), and ends by itself when its pipe does. So it outlives neither this
process nor this object.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import IO, Any, BinaryIO, Final, cast

import psutil

from engine.config import ModelConfig
from engine.errors import LoadInterrupted, ReplyFault, first_line
from engine.serving.deaths import ended_words, engine_dead
from engine.serving.process.frames import framed, read_frame, write_all
from engine.serving.process.log_records import log_again, log_level
from engine.serving.process.messages import (
    Answered,
    Ask,
    FromChild,
    Load,
    Loaded,
    Logged,
    NotLoaded,
    Progressed,
    Stepped,
    ToChild,
    is_busy,
    stats_of,
)
from engine.serving.protocol import Close, Command, Ended, Event, Outputs, Submit
from engine.serving.transport import LAST_STEP, Listener, Transport, Verb
from engine.types.model_info import EngineStats, LoadProgress, ModelInfo
from engine.types.outputs import RequestOutput, Usage

__all__ = ["ProcessTransport"]

log = logging.getLogger("verbatim.engine")

_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from engine.serving.process.child import main; main(int(sys.argv[2]))"
)
_PIPE_BYTES: Final = 1 << 20
"""Room in a pipe: a step's outputs fit, so that the child need not wait until its parent has read them."""
_LAST_WORDS: Final = 1.0
"""Seconds for a process to be gone once its pipe is."""
_REPEAT: Final = 0.25
"""Seconds after which what a load told last is told again."""


class ProcessTransport(Transport):
    """An engine in a process of its own. Owns the process, two pipes and two threads; `open` makes it."""

    def __init__(self, model_id: str) -> None:
        self._id = model_id
        self._lock = threading.Lock()  # of all down to `_ended`
        self._numbers = itertools.count()
        self._asked: dict[int, Future[Any]] = {}
        self._sent = 0  # commands
        self._taken = 0  # of them, as far as is known
        self._since: float | None = None
        self._counters: tuple[Any, ...] = ()
        self._listen: Listener | None = None
        self._ended: Ended | None = None
        self._closing = False
        self._loading: queue.SimpleQueue[Loaded | NotLoaded | Progressed] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[ToChild | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: Loaded | None = None
        self._closers = threading.Lock()
        self._writer = threading.Thread(target=self._write, name=f"to-{model_id}", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name=f"engine-{model_id}", daemon=True)

    @classmethod
    def open(
        cls,
        config: ModelConfig,
        pull: bool = False,
        progress: Callable[[LoadProgress], None] | None = None,
        beside: Sequence[Mapping[str, int]] = (),
    ) -> ProcessTransport:
        """Start a process and wait until it has loaded the model.

        Raises:
            LoadError: what the process says, or `LoadInterrupted`: how it ended. It has ended by then.
        """
        transport = cls(config.id)
        try:
            transport._start(Load(config, pull, tuple(dict(steps) for steps in beside), log_level()), progress)
        except BaseException:
            transport.kill()
            raise
        return transport

    def _start(self, wanted: Load, progress: Callable[[LoadProgress], None] | None) -> None:
        self._outbox.put(wanted)
        self._keeper.start()
        told = LoadProgress(text="starting its process")
        while True:
            try:
                message: Loaded | NotLoaded | Progressed = self._loading.get(timeout=_REPEAT)
            except queue.Empty:  # told again, so that a caller who wants the model no longer can raise
                message = Progressed(told)
            match message:
                case Progressed(told):
                    if progress is not None:
                        progress(told)
                case NotLoaded(error):
                    raise error
                case Loaded() as loaded:
                    self._loaded = loaded
                    return

    @property
    def info(self) -> ModelInfo:
        assert self._loaded is not None
        return self._loaded.info

    @property
    def step_bytes(self) -> Mapping[str, int]:
        assert self._loaded is not None
        return self._loaded.step_bytes

    @property
    def busy_since(self) -> float | None:
        return self._since

    def start(self, listen: Listener) -> None:
        with self._lock:
            self._listen = listen
            ended = self._ended
        if ended is not None:
            listen(ended)

    def send(self, command: Command) -> None:
        with self._lock:
            if self._ended is None:
                self._sent += 1
                self._since = self._since or time.monotonic()
                self._outbox.put(command)

    def ask(self, verb: Verb, argument: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()
        with self._lock:
            if self._ended is None:
                number = next(self._numbers)
                self._asked[number] = answer
                self._outbox.put(Ask(number, verb, argument))
                return answer
        answer.set_exception(self._ended.error)
        return answer

    def stats(self) -> EngineStats:
        with self._lock:
            counters, ended, process = self._counters, self._ended, self._process
        if ended is not None or process is None:
            return stats_of(counters)
        try:
            resident = psutil.Process(process.pid).memory_info().rss
        except psutil.Error:
            resident = 0
        return replace(stats_of(counters), process_id=process.pid, resident_bytes=resident)

    def close(self) -> bool:
        with self._closers:
            self._closing = True
            self.send(Close())
            if threading.current_thread() is not self._keeper:
                self._keeper.join(LAST_STEP)
                if self._keeper.is_alive():
                    log.warning("the process of %s is killed: its step does not end", self._id)
            self.kill()
            return True

    def kill(self) -> None:
        """End the process at once, and wait until nothing is left of it."""
        self._closing = True
        if self._process is not None:
            self._process.kill()  # does nothing where it has ended
        for thread in (self._keeper, self._writer):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    # -- the keeper ----------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Start the child and read what it tells, to its end. It is this thread that the child's life hangs on."""
        try:
            self._process = process = _spawn(self._id)
        except (OSError, TypeError) as error:  # no process or descriptor is left, or Python's own file is unknown
            self._finish(f"its process cannot be started: {error}")
            return
        self._writer.start()
        if self._closing:  # whoever wanted it has given up meanwhile
            process.kill()
        assert process.stdout is not None
        try:
            with io.BufferedReader(cast(io.RawIOBase, process.stdout), 1 << 16) as file:
                self._read(file)
        except Exception:
            log.exception("the process of %s is ended: what it tells cannot be read", self._id)
            process.kill()
        try:
            status = process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        self._finish(f"its process {ended_words(status)}")

    def _read(self, file: BinaryIO) -> None:
        while (message := cast("FromChild | None", read_frame(file, plain_only=True))) is not None:
            match message:
                case Stepped(event, counters, taken):
                    with self._lock:
                        self._counters, self._taken = counters, taken
                        self._since = time.monotonic() if self._sent > taken or is_busy(counters) else None
                    if event is not None:
                        self._hear(event)
                case Answered(number, value, error):
                    with self._lock:
                        answer = self._asked.pop(number)
                    if error is not None:
                        answer.set_exception(error)
                    else:
                        answer.set_result(value)
                case Logged():
                    log_again(message)
                case Loaded(_, _, counters):
                    self._counters = counters
                    self._loading.put(message)
                case NotLoaded() | Progressed():
                    self._loading.put(message)

    def _hear(self, event: Event) -> None:
        if not isinstance(event, Ended):
            assert self._listen is not None
            self._listen(event)
            return
        with self._lock:
            if self._ended is not None:
                return
            self._ended, self._since, listen = event, None, self._listen
            left = list(self._asked.values())
            self._asked.clear()
        for answer in left:
            answer.set_exception(event.error)
        if listen is not None:
            listen(event)

    def _finish(self, words: str) -> None:
        """Tell everybody of the end, and let the writer end."""
        self._outbox.put(None)
        interrupted = LoadInterrupted(f"{self._id}: while it was loaded, {words}.")
        self._loading.put(NotLoaded(interrupted))  # if anybody still waits
        cause = "the server is shutting down" if self._closing else words
        if self._loaded is not None and self._ended is None and not self._closing:
            log.error("the engine of %s has stopped: %s", self._id, words)
        self._hear(Ended(engine_dead(self._id, RuntimeError(cause))))

    # -- the writer ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with self._process.stdin as pipe:
            while (message := self._outbox.get()) is not None:
                try:
                    data = framed(message)
                except Exception as error:  # something in it is not plain data, or it is too long
                    self._refuse(message, error)
                    continue
                try:
                    write_all(pipe, data)
                except (OSError, ValueError):
                    return  # the child has ended; the keeper tells

    def _refuse(self, message: ToChild, error: Exception) -> None:
        """Fail what cannot be sent."""
        match message:
            case Ask(number):
                with self._lock:
                    answer = self._asked.pop(number, None)
                if answer is not None:
                    answer.set_exception(error)
            case Submit(request):
                with self._lock:
                    self._sent -= 1
                    if self._sent <= self._taken and not is_busy(self._counters):
                        self._since = None  # no step is awaited
                fault = ReplyFault(f"this request cannot be sent to its model: {first_line(error)}.")
                self._hear(Outputs((RequestOutput(request.request_id, (), Usage(0, 0), True, fault),)))


def _spawn(model_id: str) -> subprocess.Popen[bytes]:
    """Start the child: no fork of this process, whose threads would not be there; the same modules, found as here."""
    paths = json.dumps([*map(str, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _START, paths, str(os.getpid()), model_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,  # what a terminal sends to a whole group is for the parent, which ends this in order
    )
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        _widen(pipe)
    return process


def _widen(pipe: IO[bytes]) -> None:
    """Give a pipe more room, where the system can and the user's pipes may have it."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

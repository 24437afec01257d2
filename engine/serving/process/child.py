"""What a model's process runs: load the entry it is sent, step its engine, answer its parent. Ends with its parent.

    main thread    load, then EngineLoop: step, step, step …
    reader         commands and questions; the end of the pipe is the end of this process
    workers        prepare requests, `PREPARING` at once; which request has its turn is the parent's business

Imports what loads a model only once the parent's end is watched.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from engine.confined.child import end_with
from engine.errors import LoadError, ReplyFault, VerbatimError, first_line
from engine.serving.process.frames import framed, read_frame, write_all
from engine.serving.process.log_records import log_through
from engine.serving.process.messages import (
    Answered,
    Ask,
    FromChild,
    Load,
    Loaded,
    NotLoaded,
    Progressed,
    Stepped,
    counters_of,
)
from engine.serving.protocol import Abort, Event, Outputs
from engine.serving.transport import PREPARING
from engine.types.outputs import RequestOutput

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.loading.manifest import EarlyHashes
    from engine.serving.engine_loop import EngineLoop
    from engine.serving.teller import Teller

__all__ = ["main"]

log = logging.getLogger("verbatim.engine")


def main(parent: int) -> NoReturn:
    """Run until the parent says so, or has ended. `parent`: its process id."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # sent to all processes of a service; the parent ends them in order
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with(parent)
    _no_core_dumps()
    inbox, outbox = os.fdopen(os.dup(0), "rb"), io.FileIO(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # so that no library prints into a message
    wanted = read_frame(inbox, plain_only=False)
    if not isinstance(wanted, Load):
        os._exit(1)
    _Child(inbox, outbox).run(wanted)


class _Child:
    """The child's side of the pipes, and the engine once it is loaded."""

    def __init__(self, inbox: BinaryIO, outbox: io.FileIO) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._writing = threading.RLock()
        self._unsent: deque[bytes] = deque()
        self._workers = ThreadPoolExecutor(max_workers=PREPARING, thread_name_prefix="prepare")
        self._engine: Engine
        self._loop: EngineLoop

    def run(self, wanted: Load) -> NoReturn:
        """Load, serve, and end this process."""
        log_through(self._send, wanted.log_level)
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        try:
            self._load(wanted)
        except VerbatimError as error:
            self._end(NotLoaded(error))
        except BaseException as error:  # `load` has turned into words what a checkpoint can cause
            log.exception("loading %s failed", wanted.config.id)
            self._end(NotLoaded(LoadError(f"{wanted.config.id}: {type(error).__name__}: {first_line(error)}.")))
        self._loop.run()
        self._engine.close()
        self._end()

    def _load(self, wanted: Load) -> None:
        from engine.serving.teller import Teller

        teller = Teller(lambda progress: self._send(Progressed(progress)))
        teller.say("importing libraries and reading files")
        early = self._import(wanted, teller)
        from engine.engine import Engine
        from engine.loading.loader import load
        from engine.serving.engine_loop import EngineLoop

        log_through(self._send, wanted.log_level)
        model = load(
            wanted.config,
            pull=wanted.pull,
            progress=teller.say,
            read=teller.read,
            beside=wanted.beside,
            early=early,
        )
        self._engine = engine = Engine(model)
        self._loop = EngineLoop(engine, self._emit, on_silent_step=lambda: self._step(None))
        self._workers.submit(engine.preparer.warm)
        gc.collect()
        gc.freeze()  # a full collection over the libraries' objects stops the process for 0.3 s
        self._send(Loaded(engine.info, model.step_bytes, counters_of(self._loop.stats)))

    @staticmethod
    def _import(wanted: Load, teller: Teller) -> EarlyHashes:
        """Import what loads a model, and hash its files meanwhile."""
        # Libraries make half a million objects that stay: to look for garbage among them takes a fifth of the time.
        gc.disable()
        try:
            from engine.checkpoints.checkpoint import prepare_environment

            prepare_environment(pull=wanted.pull)  # before the hub's library is imported, which reads it once
            from engine.loading.manifest import EarlyHashes

            early = EarlyHashes(wanted.config, teller.read)
            importlib.import_module("engine.loading.loader")
            gc.freeze()
            return early
        finally:
            gc.enable()

    def _end(self, last: FromChild | None = None) -> NoReturn:
        """End this process at once: nothing of it is worth tearing down, and threads of libraries may still compute."""
        if last is not None:
            self._send(last)
        sys.stderr.flush()
        os._exit(0)

    # -- what comes --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while (message := read_frame(self._inbox, plain_only=False)) is not None:
                if not isinstance(message, Ask):
                    self._loop.commands.put(message)
                elif message.verb == "token_text":  # a lookup, which need not wait for its turn behind long prompts
                    self._answer(message)
                else:
                    self._workers.submit(self._answer, message)
        except BaseException:
            log.exception("what the server sends cannot be read")
            os._exit(1)
        os._exit(0)  # the parent has ended, however it did

    def _answer(self, asked: Ask) -> None:
        from engine.serving.preparing import answer

        try:
            told = Answered(asked.number, answer(self._engine, asked.verb, asked.argument))
        except VerbatimError as error:
            told = Answered(asked.number, error=error)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            log.exception("a question could not be answered: %s", asked.verb)
            told = Answered(asked.number, error=_crossing(error))
        try:
            self._send(told)
        except Exception as error:  # it holds something that is not plain data, or is too long
            log.exception("an answer could not be sent: %s", asked.verb)
            self._send(Answered(asked.number, error=_crossing(error)))

    # -- what goes ---------------------------------------------------------------------------------------------------

    def _send(self, message: FromChild) -> None:
        """Send a message from any thread, waiting where the pipe is full; the parent always reads.

        Raises: as `framed`.
        """
        data = framed(message, plain_only=True)
        try:
            with self._writing:
                self._unsent.append(data)
                if len(self._unsent) > 1:  # a finaliser logs, in the midst of this thread's write, which goes on below
                    return
                while self._unsent:
                    write_all(self._outbox, self._unsent[0])
                    self._unsent.popleft()
        except (OSError, ValueError):
            os._exit(0)  # the parent has ended

    def _emit(self, event: Event) -> None:
        """Send what has happened. A step's outputs go in one message, which wakes the parent's event loop once."""
        try:
            self._step(event)
        except Exception as error:
            if not isinstance(event, Outputs):
                raise
            if len(event.outputs) > 1:
                middle = len(event.outputs) // 2
                self._emit(Outputs(event.outputs[:middle]))
                self._emit(Outputs(event.outputs[middle:]))
            else:
                self._give_up(event.outputs[0], error)

    def _step(self, event: Event | None) -> None:
        self._send(Stepped(event, counters_of(self._loop.stats), self._loop.taken))

    def _give_up(self, output: RequestOutput, error: Exception) -> None:
        """End a request whose output cannot be sent; the others go on."""
        log.error("%s: an output could not be sent", output.request_id, exc_info=error)
        fault = ReplyFault(f"this reply could not be sent: {type(error).__name__}; the log has the details.")
        self._step(Outputs((RequestOutput(output.request_id, (), output.usage, True, fault),)))
        if not output.finished:
            self._loop.commands.put(Abort(output.request_id))


def _crossing(error: BaseException) -> Exception:
    """Return an exception that says the same and crosses the pipe: its own class may know no way back."""
    words = first_line(error)
    if isinstance(error, MemoryError):
        return MemoryError(words)
    return RuntimeError(words if type(error) is RuntimeError else f"{type(error).__name__}: {words}")


def _no_core_dumps() -> None:
    """Prevent core dumps, as the server does for itself: they would leave prompts in a file after a crash."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # a program that collects dumps gets one without memory
        Path("/proc/self/coredump_filter").write_text("0")

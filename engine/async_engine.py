"""`AsyncEngine`: an `EngineCore` on its own thread, spoken to from an event loop.

    event loop ──commands──▶ engine thread: step, step, step …
         ◀──one call_soon_threadsafe per step── everything the step did

Five verbs: `prepare`, `submit`, `abort`, `stats`, `close`. What crosses is plain data. If the thread dies, every
waiting request gets the cause and every later one is refused with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from engine.core import EngineCore, reply_fault
from engine.errors import EngineDead, QueueFull, QueueTimeout, VerbatimError, panicked
from engine.fair_lock import FairLock
from engine.model import LoadedModel
from engine.preparation import Preparer
from engine.types.model_info import EngineStats, ModelInfo
from engine.types.outputs import RequestOutput, Usage
from engine.types.requests import GenerationRequest, PreparedRequest

log = logging.getLogger("verbatim.engine")

LAST_STEP = 5.0
"""Seconds that a step may take on when the engine is told to stop."""

PREPARING = 3
"""Requests of one model that are prepared at once: two heavy ones of a key, and one of anybody else."""

Command = Callable[[EngineCore], None]


class RequestStream(AsyncIterator[RequestOutput]):
    """The outputs of one request, as they come. Ends after the one that is `finished`.

    Used on the event loop that submitted the request, by one reader.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._outputs: deque[RequestOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None  # the reader, while it waits
        self._ended = False
        self.leaving: asyncio.Future[None] | None = None
        """Done when the engine has let go of a request that was aborted; None if it was not."""
        self.usage: Usage | None = None
        """Of the last output that came, read or not, and of an aborted request what was computed; None before."""
        self.finish_reasons: list[str] = []
        """Of the choices that have ended."""
        self.error: VerbatimError | None = None
        """What ended the request, if it was not its end."""

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._outputs.popleft()

    def ready(self) -> list[RequestOutput]:
        """What has arrived and was not read yet; does not wait. For a reader that is slower than the engine."""
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs

    async def let_go(self) -> None:
        """Wait until the engine computes nothing more for this request; then `usage` is the last word."""
        if self.leaving is not None:
            await asyncio.shield(self.leaving)

    def note(self, output: RequestOutput) -> None:
        """Keep the sums of an output, whether it is read or not."""
        self.usage, self.error = output.usage, output.error
        self.finish_reasons += [delta.finish_reason for delta in output.deltas if delta.finish_reason]

    def deliver(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self.note(output)
        self._ended = self._ended or output.finished
        self._wake()

    def end(self) -> None:
        """No more will come."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """One loaded model, shared by many requests.

    Created anywhere; `submit` and the streams belong to one event loop, the first that submits.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.info: ModelInfo = model.info
        self._core = EngineCore(model)
        self._preparer = Preparer(
            model.config,
            model.info,
            model.tokenizer,
            model.vocabulary,
            model.template,
            model.grammars,
            model.chat_format,
        )
        self._limit = model.config.max_sequences + model.config.max_queue
        self._queue_seconds = model.config.max_queue_seconds
        self._arrived: dict[str, float] = {}  # monotonic seconds, of requests that wait; the engine thread's own
        self._stall_timeout = model.config.stall_timeout
        self._threads = model.config.threads
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}
        self._leaving: dict[str, RequestStream] = {}  # aborted, and the engine does not know it yet
        self._groups: dict[str, str] = {}  # of unfinished requests
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cause: BaseException | None = None
        self._closed = False
        self._close_lock = threading.Lock()
        self._stats = self._core.stats()
        self._busy_since: float | None = None  # monotonic seconds at which the step under way began
        self._turns = FairLock(PREPARING)
        self._workers = ThreadPoolExecutor(max_workers=PREPARING, thread_name_prefix=f"prepare-{self.info.id}")
        self._workers.submit(self._preparer.warm)
        self._thread = threading.Thread(target=self._run, name=f"engine-{self.info.id}", daemon=True)
        self._thread.start()

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Template, tokens, limits, on one of the model's own worker threads; groups take turns for them.

        Given up while it waits for one, it never gets one. Given up later, it keeps its place until the thread is done.

        Raises: what `Preparer.prepare` raises, and EngineDead.
        """
        self._raise_if_dead()
        await self._turns.take(request.group)
        try:
            self._raise_if_dead()
            work = asyncio.get_running_loop().run_in_executor(self._workers, self._preparer.prepare, request)
        except BaseException:
            self._turns.give_back(request.group)
            raise
        work.add_done_callback(lambda done: self._prepared(done, request.group))
        return await asyncio.shield(work)

    def _prepared(self, work: asyncio.Future[PreparedRequest], group: str) -> None:
        self._turns.give_back(group)
        if not work.cancelled():
            work.exception()  # looked at, whoever is left to hear of it

    def submit(self, request: PreparedRequest) -> RequestStream:
        """Queue a request. A group of which none is unfinished may still queue one where there is no room.

        Raises:
            QueueFull: as many requests as may run and wait are unfinished.
            EngineDead: with the cause.
        """
        self._raise_if_dead()
        if len(self._streams) >= self._limit and (not request.group or request.group in self._groups.values()):
            raise QueueFull(
                f"{len(self._streams)} requests are running or waiting; {self.info.id} takes {self._limit}.",
                limit=self._limit,
            )
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what left on another loop, which has ended, hears no more
            self._leaving.clear()
        self._loop = loop
        if request.request_id in self._streams:
            raise ValueError(f"the request id {request.request_id!r} is in use")
        stream = RequestStream(request.request_id)
        self._streams[request.request_id] = stream
        self._groups[request.request_id] = request.group
        self._commands.put(lambda core: self._add(core, request))
        return stream

    def abort(self, request_id: str) -> None:
        """Free a request's place before the next step. Does nothing if it is gone.

        Its stream ends at once; what it has used is known when the step under way has ended (`RequestStream.let_go`).
        """
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            del self._groups[request_id]
            assert self._loop is not None
            stream.leaving = self._loop.create_future()
            self._leaving[request_id] = stream
            stream.end()
            self._commands.put(lambda core: self._post(self._left, (request_id, core.abort(request_id))))

    def stats(self) -> EngineStats:
        since = self._busy_since
        stalled = since is not None and time.monotonic() - since > self._stall_timeout
        return replace(self._stats, alive=self._cause is None and not self._closed, stalled=stalled)

    def close(self) -> bool:
        """Stop after the step under way; unfinished requests end with EngineDead. Safe to call twice.

        A step that does not end (a kernel that hangs, a driver) is not waited for longer than `LAST_STEP` seconds: then
        this is False, and the thread is left behind.
        """
        with self._close_lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
                self._thread.join(LAST_STEP)
                self._core.close()
                self._preparer.close()  # first, or a grammar that is tried would be waited for
                self._workers.shutdown(wait=not self._thread.is_alive(), cancel_futures=True)
                if self._thread.is_alive():
                    log.error("the engine of %s is left behind: its step does not end", self.info.id)
                    self._cause = RuntimeError("its step does not end")
                    self._post(self._fail_all, self._cause)
            return not self._thread.is_alive()

    # -- on the engine thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._threads:
            import torch

            torch.set_num_threads(self._threads)  # a setting of the calling thread
        try:
            while self._obey():
                self._busy_since = time.monotonic()
                outputs = self._core.step()
                self._busy_since = None
                outputs += self._expire()
                self._stats = self._core.stats()
                if outputs:
                    self._post(self._deliver, outputs)
            cause: BaseException = RuntimeError("the server is shutting down")
        except BaseException as error:
            log.exception("the engine of %s died", self.info.id)
            cause = error
        self._busy_since = None
        self._cause = cause
        self._post(self._fail_all, cause)

    def _add(self, core: EngineCore, request: PreparedRequest) -> None:
        try:
            core.add(request)
        except BaseException as error:  # its grammar does not start; the others' replies go on
            if not isinstance(error, Exception) and not panicked(error):
                raise
            fault = reply_fault(request.request_id, error)
            self._post(self._deliver, [RequestOutput(request.request_id, (), Usage(0, 0), True, fault)])
            return
        if self._queue_seconds is not None:
            self._arrived[request.request_id] = time.monotonic()

    def _expire(self) -> list[RequestOutput]:
        """End the requests that have waited too long for their turn."""
        if not self._arrived:
            return []
        now, limit = time.monotonic(), self._queue_seconds or 0.0
        queued = self._core.queued()
        self._arrived = {name: self._arrived[name] for name in queued if name in self._arrived}
        late = [name for name, since in self._arrived.items() if now - since > limit]
        error = QueueTimeout(f"this request has waited {limit:g} seconds for its turn, which is as long as one may.")
        for name in late:
            del self._arrived[name]
        return [self._core.refuse(name, error) for name in late]

    def _obey(self) -> bool:
        """Carry out the waiting commands; sleeps while there is nothing to do. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self._core.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(self._core)
            self._stats = self._core.stats()

    def _post(self, function: Callable[..., None], argument: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is listening any more
                self._loop.call_soon_threadsafe(function, argument)

    # -- on the event loop --------------------------------------------------------------------------------------

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None and output.request_id in self._leaving:
                self._leaving[output.request_id].note(output)
            if stream is not None:
                stream.deliver(output)
                if output.finished:
                    del self._streams[output.request_id], self._groups[output.request_id]

    def _left(self, request: tuple[str, Usage | None]) -> None:
        """The engine has let go of an aborted request; it may have ended in the step that was under way."""
        request_id, usage = request
        stream = self._leaving.pop(request_id, None)
        if stream is not None and stream.leaving is not None and not stream.leaving.done():
            stream.usage = usage or stream.usage
            stream.leaving.set_result(None)

    def _fail_all(self, cause: BaseException) -> None:
        for request_id in list(self._leaving):
            self._left((request_id, None))
        error = self._dead(cause)
        for request_id, stream in list(self._streams.items()):
            stream.deliver(RequestOutput(request_id, (), stream.usage or Usage(0, 0), True, error))
        self._streams.clear()
        self._groups.clear()

    def _dead(self, cause: BaseException) -> VerbatimError:
        return EngineDead(f"the engine of {self.info.id} has stopped: {_words(cause)}")

    def _raise_if_dead(self) -> None:
        if self._cause is not None:
            raise self._dead(self._cause)
        if self._closed:
            raise EngineDead(f"the engine of {self.info.id} has stopped: the server is shutting down")


def _words(cause: BaseException) -> str:
    """What every client may be told of a death: words of the system, in one line. Others may quote a request."""
    name = type(cause).__name__
    if isinstance(cause, OSError):
        words = os.strerror(cause.errno) if cause.errno is not None else ""
    elif type(cause) in (RuntimeError, MemoryError) or type(cause).__module__.partition(".")[0] == "torch":
        words = (str(cause).splitlines() or [""])[0][:200]
    else:
        words = ""
    return words if type(cause) is RuntimeError and words else f"{name}: {words}" if words else f"{name}; see the log"

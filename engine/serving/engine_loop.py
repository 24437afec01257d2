"""`EngineLoop`: drives an `Engine` on the thread that runs it. Takes commands, steps, reports what happened.

It does not know who sends the commands or how its events travel.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable

from engine.engine import Engine
from engine.errors import QueueTimeout, panicked
from engine.faults import reply_fault
from engine.serving.deaths import engine_dead
from engine.serving.protocol import Abort, Aborted, Close, Command, Ended, Event, Outputs, Submit
from engine.serving.waiting.queue_times import QueueTimes
from engine.types.model_info import EngineStats
from engine.types.outputs import RequestOutput, Usage
from engine.types.requests import PreparedRequest

__all__ = ["EngineLoop"]

log = logging.getLogger("verbatim.engine")


class EngineLoop:
    """Obeys commands between steps until it is told to stop, or dies.

    Attributes:
        commands: what to do next. Put them in from any thread.
        stats: a snapshot after the last step or command.
        busy_since: monotonic seconds at which the step under way began; None between steps.
        taken: how many commands were taken so far.
    """

    def __init__(
        self, engine: Engine, emit: Callable[[Event], None], on_silent_step: Callable[[], None] | None = None
    ) -> None:
        """`emit`: takes an event. `on_silent_step`: called after a step without one. Both on the loop's own thread."""
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.stats: EngineStats = engine.stats()
        self.busy_since: float | None = None
        self.taken = 0
        self._engine = engine
        self._emit = emit
        self._on_silent_step = on_silent_step
        self._queue_seconds = engine.model.config.max_queue_seconds
        self._times = QueueTimes()

    def run(self) -> None:
        """Step while there is work, sleep while there is none. Returns after `Close` or a death, with `Ended` sent."""
        if self._engine.model.config.threads:
            import torch

            torch.set_num_threads(self._engine.model.config.threads)  # a setting of the calling thread
        try:
            while self._obey():
                self.busy_since = began = time.monotonic()
                outputs = self._engine.step()
                self.busy_since = None
                self._times.begin(began, self._engine.queued)
                outputs = self._times.told(outputs) + self._expire()
                self.stats = self._engine.stats()
                if outputs:
                    self._emit(Outputs(tuple(outputs)))
                elif self._on_silent_step is not None:
                    self._on_silent_step()
            cause: BaseException = RuntimeError("the server is shutting down")
        except BaseException as error:
            log.exception("the engine of %s died", self._engine.info.id)
            cause = error
        self.busy_since = None
        self._emit(Ended(engine_dead(self._engine.info.id, cause)))

    def _obey(self) -> bool:
        """Carry out the waiting commands; sleep while there is nothing to do. False: stop."""
        while True:
            try:
                command = self.commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            self.taken += 1
            match command:
                case Close():
                    return False
                case Submit(request):
                    self._add(request)
                case Abort(request_id):
                    self._times.forget(request_id)
                    usage = self._engine.abort(request_id)
                    self.stats = self._engine.stats()  # whoever hears of it finds the counters as they are now
                    self._emit(Aborted(request_id, usage))
            self.stats = self._engine.stats()

    def _add(self, request: PreparedRequest) -> None:
        try:
            self._engine.add(request)
        except BaseException as error:  # its grammar does not start; the others' replies go on
            if not isinstance(error, Exception) and not panicked(error):
                raise
            fault = reply_fault(request.request_id, error)
            self._emit(Outputs((RequestOutput(request.request_id, (), Usage(0, 0), True, fault),)))
            return
        self._times.arrive(request.request_id, time.monotonic())

    def _expire(self) -> list[RequestOutput]:
        """End the requests that have waited too long for their first step."""
        if self._queue_seconds is None:
            return []
        limit = self._queue_seconds
        error = QueueTimeout(f"this request has waited {limit:g} seconds for its turn, which is as long as one may.")
        return [self._engine.refuse(name, error) for name in self._times.late(time.monotonic(), limit)]

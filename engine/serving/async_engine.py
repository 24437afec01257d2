"""`AsyncEngine`: an `Engine` on a thread of its own, spoken to from an event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from engine.engine import Engine
from engine.errors import VerbatimError
from engine.serving.client import EngineClient
from engine.serving.engine_loop import EngineLoop
from engine.serving.preparing import answer
from engine.serving.protocol import Close, Command
from engine.serving.transport import LAST_STEP, PREPARING, Listener, Transport, Verb
from engine.types.model_info import EngineStats, ModelInfo

__all__ = ["AsyncEngine", "ThreadTransport"]

log = logging.getLogger("verbatim.engine")


class AsyncEngine(EngineClient):
    """One loaded model in this process. Owns its engine, the engine's thread and those that prepare requests."""

    def __init__(self, engine: Engine, on_death: Callable[[VerbatimError], None] | None = None) -> None:
        self.engine = engine
        super().__init__(ThreadTransport(engine), engine.model.config, on_death)


class ThreadTransport(Transport):
    """An engine on a thread of this process. `loop`: what the thread runs, once it is started."""

    loop: EngineLoop

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        name = engine.info.id
        self._workers = ThreadPoolExecutor(max_workers=PREPARING, thread_name_prefix=f"prepare-{name}")
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._closed = False

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def step_bytes(self) -> Mapping[str, int]:
        return self._engine.model.step_bytes

    @property
    def busy_since(self) -> float | None:
        return self.loop.busy_since

    def start(self, listen: Listener) -> None:
        self.loop = EngineLoop(self._engine, listen)
        self._workers.submit(self._engine.preparer.warm)
        self._thread.start()

    def _run(self) -> None:
        self.loop.run()

    def send(self, command: Command) -> None:
        self.loop.commands.put(command)

    def ask(self, verb: Verb, argument: Any) -> Future[Any]:
        if verb == "token_text":  # a lookup, which need not wait for its turn behind long prompts
            found: Future[Any] = Future()
            found.set_result(answer(self._engine, verb, argument))
            return found
        return self._workers.submit(answer, self._engine, verb, argument)

    def stats(self) -> EngineStats:
        return self.loop.stats

    def close(self) -> bool:
        if not self._closed:
            self._closed = True
            self.send(Close())
            self._thread.join(LAST_STEP)
            self._engine.close()  # first, or a grammar that is tried would be waited for
            self._workers.shutdown(wait=not self._thread.is_alive(), cancel_futures=True)
            if self._thread.is_alive():
                log.error("the engine of %s is left behind: its step does not end", self.info.id)
        return not self._thread.is_alive()

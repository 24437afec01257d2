"""`Registry`: the models of one server, which come and go. Does what `ModelTable` decides, on threads of its own.

    event loop ──acquire──▶ table ◀──what happened── keeper thread ──▶ one thread for each load and unload
         ◀─────lease──────────┘

Knows no memory and no checkpoint but what a `MemoryView` says, and no engine but what `open` returns.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from engine.config import ModelConfig
from engine.errors import EngineDead, LoadError, ModelInUse, ModelLoading, VerbatimError
from engine.serving.adapter_view import views
from engine.serving.models.changes import Changes
from engine.serving.models.life import Life, Opener, Stopped, held_bytes
from engine.serving.models.outline import HostMemory, MemoryView, Outline
from engine.serving.models.release import give_back_after
from engine.serving.models.slot import Slot
from engine.serving.models.status import Lease, ModelStatus, with_adapters
from engine.serving.models.table import Load, ModelTable, Refused, Unload
from engine.serving.models.waiters import Waiters
from engine.serving.opening import open_engine
from engine.serving.protocol import EngineProtocol
from engine.types.model_info import LoadProgress, ModelInfo

__all__ = ["Registry"]

log = logging.getLogger("verbatim.engine")

_LAST_LOAD: float = 2.0
"""Seconds that loads under way may take on when the registry is closed; each ends at the next thing that it tells."""

_LOOK: float = 0.05
"""Seconds between two looks at a model that is to be unloaded."""


class Registry:
    """Owns the engines of a server: its threads make them and close them, and `close` ends all.

    Args:
        pull: fetch what is not in the hub's cache.
        on_progress: told `ID: what happens`, on any thread; the same again where only the bytes that are read differ.
        open: loads a model.
        max_loaded: models that may be loaded at once; None: as many as memory holds.
        memory: what is known of memory and checkpoints before a model is loaded.
    """

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        *,
        pull: bool = False,
        on_progress: Callable[[str], None] | None = None,
        open: Opener = open_engine,  # type: ignore[assignment]
        max_loaded: int | None = None,
        memory: MemoryView | None = None,
    ) -> None:
        self._table = ModelTable(configs, max_loaded)
        self._pull, self._on_progress, self._open = pull, on_progress, open
        self._memory: MemoryView = memory or HostMemory()
        self._engines: dict[Slot, EngineProtocol] = {}
        self._infos: dict[Slot, ModelInfo] = {}
        self._outlines: dict[Slot, Outline | None] = {}
        self._lives: dict[Slot, Life] = {}
        self._waiters = Waiters()
        self._news = threading.Condition()  # guards all of the above
        self._dirty = True
        self._closing = False
        self._loaders: set[threading.Thread] = set()
        self._keeper = threading.Thread(target=self._keep, name="models", daemon=True)

    # -- for everybody ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to load in the background. Safe to call twice."""
        if self._keeper.ident is None and not self._closing:
            self._keeper.start()

    def get(self, model_id: str) -> EngineProtocol:
        """Return the engine of a model that is ready, for a look at it: it may leave at any time.

        Raises:
            ModelNotFound: no entry has this id; names those that exist.
            ModelLoading: it is not loaded.
            EngineDead: it could not be loaded, or has died.
        """
        with self._news:
            slot = self._table.find(model_id)
            if slot in self._engines and slot.state == "ready":
                return self._view(slot, model_id)
            if slot.state in ("failed", "dead"):
                what = "could not be loaded" if slot.state == "failed" else "has died"
                raise EngineDead(f"{model_id} {what}: {slot.detail.removeprefix(f'{slot.id}: ')}")
            raise ModelLoading(f"{model_id} is {slot.state} ({slot.detail}).")

    def list(self) -> list[ModelStatus]:
        """Return the state of every entry, in the order of the configuration, each followed by its adapters."""
        with self._news:
            return [one for slot in self._table.shown() for one in with_adapters(self._status(slot), slot.config)]

    def status(self, model_id: str) -> ModelStatus:
        """Return the state of one entry or adapter. Raises: `ModelNotFound`."""
        with self._news:
            slot = self._table.find(model_id)
            return next(one for one in with_adapters(self._status(slot), slot.config) if one.id == model_id)

    def wait(self) -> None:
        """Wait until every entry that is loaded at start is loaded or has failed."""
        with self._news:
            self._news.wait_for(lambda: self._closing or not self._table.starting)

    def apply(self, configs: Sequence[ModelConfig], max_loaded: int | None) -> Changes:
        """Take over a changed configuration: load, unload and replace only what differs. Requests that run go on."""
        with self._news:
            changes = self._table.apply(configs)
            self._table.max_loaded = max_loaded
            self._tell_keeper()
        return changes

    def close(self) -> bool:
        """End loads under way and close every engine. Safe to call twice. False if something was left behind."""
        with self._news:
            self._closing = True
            self._table.stop()
            engines = list(self._engines.values())
            self._waiters.wake(everybody=True)
            loaders = list(self._loaders)
            self._tell_keeper()
        with ThreadPoolExecutor(max(1, len(engines))) as closers:  # side by side: waiting for one may take long
            ended = all(closers.map(lambda engine: engine.close(), engines))
        deadline = time.monotonic() + _LAST_LOAD
        for loader in loaders:
            loader.join(max(0.0, deadline - time.monotonic()))
        return ended and not any(loader.is_alive() for loader in loaders)

    # -- for one event loop -------------------------------------------------------------------------------------

    async def acquire(self, model_id: str) -> Lease:
        """Return a ready engine that stays until the lease is released. Loads a model that is loaded on demand.

        Whoever gives up while it waits does not end the loading.

        Raises:
            ModelNotFound: no entry has this id.
            ModelLoading: it loads since the server has started, or takes longer than `max_load_seconds`.
            NoRoom: it does not fit, and no other model can leave.
            QueueFull: too many requests wait for it already.
            EngineDead: it could not be loaded.
        """
        return await self._acquire(model_id, insist=False)

    async def load(self, model_id: str, *, wait: bool = True) -> ModelStatus:
        """Load a model, also one that has failed before, and return its state.

        Args:
            wait: until it is ready; otherwise it goes on in the background.

        Raises: as `acquire`, but nothing is too long or too many.
        """
        if wait:
            (await self._acquire(model_id, insist=True)).release()
        else:
            with self._news:
                self._table.ask(model_id)
                self._tell_keeper()
        return self.status(model_id)

    async def unload(self, model_id: str, wait_seconds: float = 0.0) -> ModelStatus:
        """Unload a model and return its state. New requests are served meanwhile, and load it again afterwards.

        Args:
            wait_seconds: how long to wait until it has no requests.

        Raises:
            ModelNotFound: no entry has this id.
            ModelInUse: it has requests, or is being loaded.
            EngineDead: the server stops.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                with self._news:
                    slot = self._table.dismiss(model_id)
                    self._tell_keeper()
                break
            except ModelInUse:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_LOOK)
        with self._news:
            gone = self._waiters.add(lambda: slot.state != "unloading")
            self._tell_keeper()
        await gone
        return self.status(model_id)

    async def _acquire(self, model_id: str, *, insist: bool) -> Lease:
        deadline: float | None = None
        while True:
            with self._news:
                slot = self._table.claim(model_id, time.monotonic(), insist=insist)
                if slot.state == "ready":
                    return self._lease(slot, model_id)
                future = self._waiters.add(partial(_answered, slot))
                self._tell_keeper()
            if deadline is None and not insist:
                deadline = asyncio.get_running_loop().time() + slot.config.max_load_seconds
            try:
                async with asyncio.timeout_at(deadline):
                    await future
            except TimeoutError:
                self._give_up(slot, future)
                limit = slot.config.max_load_seconds
                raise ModelLoading(f"{model_id} is not loaded after {limit:g} s ({slot.detail}).") from None
            except BaseException:
                self._give_up(slot, future)
                raise
            with self._news:
                if slot in self._engines and not self._closing:
                    return self._lease(slot, model_id)
                error = slot.error if slot.state in ("failed", "unloaded") else None
                self._table.release(slot, time.monotonic())
            if error is not None and not self._closing:
                raise _told(slot, error)
            # its entry was replaced, it died before it could be used, or the server stops: ask again

    def _give_up(self, slot: Slot, future: asyncio.Future[None]) -> None:
        with self._news:
            self._waiters.forget(future)
            self._table.release(slot, time.monotonic())
            self._tell_keeper()

    def _view(self, slot: Slot, model_id: str) -> EngineProtocol:
        """Return a slot's engine, seen with one of its adapters if the id is that of one."""
        engine = self._engines[slot]
        return engine if model_id == slot.id else views(engine)[model_id]

    def _lease(self, slot: Slot, model_id: str) -> Lease:
        def give_back() -> None:
            with self._news:
                self._table.release(slot, time.monotonic())
                self._tell_keeper()

        return Lease(self._view(slot, model_id), give_back)

    # -- the keeper's thread ------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Carry out what the table decides, until the registry is closed."""
        while True:
            self._look_at([slot for slot in list(self._table.slots) if slot.state == "waiting"])
            free = self._memory.free()
            with self._news:
                if self._closing:
                    return
                self._dirty = False
                for slot, engine in self._engines.items():
                    slot.held = held_bytes(engine)  # caches grow
                self._table.plan(free, time.monotonic())
                left = [one for action in self._table.actions for one in self._begin(action)]
                self._table.actions.clear()
                self._waiters.wake()
            for work in left:  # without the lock: a terminal that is held takes nothing
                work()
            with self._news:
                unknown = [slot for slot in self._table.slots if slot not in self._outlines]
                if not self._dirty and not unknown:
                    self._sleep()
            self._look_at(unknown[:1])

    def _sleep(self) -> None:
        due = self._table.next_due()
        seconds = None if due is None else max(0.0, due - time.monotonic()) + 0.01
        self._news.wait_for(lambda: self._dirty or self._closing, seconds)

    def _look_at(self, slots: Sequence[Slot]) -> None:
        """Read what the checkpoints of some slots say of themselves."""
        for slot in slots:
            if slot not in self._outlines:
                outline = self._memory.outline(slot.config)
                with self._news:
                    self._outlines[slot] = outline
                    slot.needed = outline.needed if outline is not None else None
        with self._news:
            known = set(self._table.slots)
            for gone in self._outlines.keys() - known:
                del self._outlines[gone]
                self._infos.pop(gone, None)
                self._lives.pop(gone, None)

    def _begin(self, action: Load | Unload | Refused) -> Sequence[Callable[[], None]]:
        """Carry out an action on a thread of its own. Returns what is left to be done without the lock."""
        slot = action.slot
        if isinstance(action, Refused):
            return [partial(self._say, slot, f"not loaded: {slot.detail}")]
        loads = isinstance(action, Load)
        left = () if loads else (partial(self._say, slot, slot.detail),)
        work, name = self._load if loads else self._unload, f"{type(action).__name__}-{slot.id}"
        thread = threading.Thread(target=work, args=(slot,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as fault:  # the system has no thread to give
            ended = partial(self._end_load, slot, Life(), None, LoadError(f"{slot.id}: {fault}."))
            return [*left, ended if loads else partial(self._unload, slot)]
        if loads:
            self._loaders.add(thread)
        return left

    def _tell_keeper(self) -> None:
        """Have the keeper look at the table again. With the lock held."""
        self._dirty = True
        self._news.notify_all()

    # -- threads of loads and unloads ---------------------------------------------------------------------------

    def _load(self, slot: Slot) -> None:
        life = Life()
        with self._news:
            self._lives[slot] = life
            beside = [getattr(engine, "step_bytes", {}) for engine in self._engines.values()]
        engine, error = None, None
        try:
            engine = self._open(
                slot.config,
                pull=self._pull,
                progress=lambda news: self._note(slot, news),
                beside=beside,
                on_death=lambda fault: self._died(slot, life, fault),
            )
        except VerbatimError as fault:
            error = fault
        except Exception as fault:
            if not isinstance(fault, Stopped):
                log.exception("loading %s failed", slot.id)
            error = LoadError(f"{type(fault).__name__}: {fault}")
        self._end_load(slot, life, engine, error)

    def _note(self, slot: Slot, news: LoadProgress) -> None:
        """Note the progress of a load. One that nobody wants any more ends with what this raises."""
        if self._closing or (slot.retired and not slot.users):
            raise Stopped("it is not wanted any more")
        slot.progress = news if news.total_bytes else None
        slot.detail = news.text
        self._say(slot, news.text)

    def _end_load(self, slot: Slot, life: Life, engine: EngineProtocol | None, error: VerbatimError | None) -> None:
        with self._news:
            self._loaders.discard(threading.current_thread())
            slot.progress = None
            kept = engine is not None and not self._closing
            if kept and engine is not None:
                self._engines[slot], self._infos[slot] = engine, engine.info
                self._table.opened(slot, held_bytes(engine), time.monotonic())
                if life.death is not None:  # already
                    self._bury(slot, life.death)
            elif error is not None:
                self._table.failed(slot, error)
            self._tell_keeper()
        if engine is not None and not kept:
            engine.close()
        if not self._closing:
            self._say(slot, "ready" if kept else f"failed: {error.message}" if error is not None else "")

    def _died(self, slot: Slot, life: Life, error: VerbatimError) -> None:
        """Note that an engine has stopped by itself. On a thread of the engine's."""
        with self._news:
            life.death = error
            if not self._closing and slot in self._engines and self._lives.get(slot) is life:
                self._bury(slot, error)

    def _bury(self, slot: Slot, error: VerbatimError) -> None:
        if slot.state != "ready":
            return  # it is being unloaded
        engine = self._engines.pop(slot)
        self._table.died(slot, error, time.monotonic())
        log.error("%s has died: %s", slot.id, slot.detail)
        threading.Thread(target=engine.close, name=f"bury-{slot.id}", daemon=True).start()
        self._tell_keeper()

    def _unload(self, slot: Slot) -> None:
        with self._news:
            engine = self._engines.pop(slot, None)
        if engine is not None and not engine.close():
            log.error("the engine of %s did not end, and keeps its memory", slot.id)
        engine = None
        give_back_after(slot)
        with self._news:
            self._table.unloaded(slot)
            self._tell_keeper()

    # -- telling ------------------------------------------------------------------------------------------------

    def _status(self, slot: Slot) -> ModelStatus:
        engine = self._engines.get(slot)
        return ModelStatus(
            slot.id,
            slot.state,
            slot.detail,
            self._infos.get(slot),
            slot.config.load,
            slot.required,
            slot.users,
            slot.progress if slot.state == "loading" else None,
            None if engine is None else held_bytes(engine) or engine.info.weight_bytes,
            self._outlines.get(slot),
        )

    def _say(self, slot: Slot, text: str) -> None:
        if self._on_progress:
            self._on_progress(f"{slot.id}: {text}")


def _told(slot: Slot, error: VerbatimError) -> VerbatimError:
    """What a request is told that has waited in vain."""
    if isinstance(error, LoadError):
        return EngineDead(f"{slot.id} could not be loaded: {error.message.removeprefix(f'{slot.id}: ')}")
    return error


def _answered(slot: Slot) -> bool:
    return slot.answers_waiters

"""`ModelTable`: decides which models are loaded and unloaded, and in which order. Touches nothing.

The registry tells it what happens and what time it is, and does what it puts into `actions`. Rules:

- At start, models are loaded in the order of the file, several side by side where memory allows. Where it is not known
  what one needs, as on a GPU, it is loaded alone: it takes what the others have left.
- A model that somebody uses or waits for never leaves. For one that is wanted, idle ones leave: the least recently used
  first, and none at all if they would not suffice.
- Nothing is decided by memory while a model is being loaded or unloaded: what is free is known once it has ended.
- A model that dies is loaded again after a pause, `PAUSES` times without a long life between; then it has failed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.config import ModelConfig
from engine.errors import EngineDead, ModelInUse, ModelLoading, ModelNotFound, NotEnoughMemory, QueueFull, VerbatimError
from engine.serving.models.changes import Changes
from engine.serving.models.room import refusal
from engine.serving.models.slot import OCCUPYING, Slot, differs_only_in_place

__all__ = ["Load", "ModelTable", "Refused", "Unload"]

SIDE_BY_SIDE: Final = 3
"""Models that are loaded at once, at most."""

PAUSES: Final = (1.0, 5.0, 25.0)
"""Seconds before a model that has died is loaded again: the first time, the second, and so on."""

LONG_LIFE: Final = 600.0
"""Seconds after which the deaths of a model that has not died again are forgotten."""


@dataclass(frozen=True, slots=True)
class Load:
    """Load the model of a slot; tell `opened` or `failed`."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Unload:
    """Close the engine of a slot; tell `unloaded`."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Refused:
    """There is no room for the model of a slot; its `detail` says why. Only to be told."""

    slot: Slot


class ModelTable:
    """The slots of all entries. An entry that was replaced has two for a while: the newest is the last of its id.

    Attributes:
        slots: in the order in which they were made.
        actions: what is to be done now, in order; the caller takes them out.
        max_loaded: models that may be loaded at once; None: as many as memory holds.
    """

    def __init__(self, configs: Sequence[ModelConfig], max_loaded: int | None = None) -> None:
        self.max_loaded = max_loaded
        self.actions: list[Load | Unload | Refused] = []
        self.slots: list[Slot] = [
            Slot(config, "unloaded", "loaded on demand") if config.load == "on_demand" else Slot(config, required=True)
            for config in configs
        ]
        self._order = [config.id for config in configs]
        self._numbers = itertools.count()
        self._stopped = False
        for slot in self.slots:
            if slot.required:
                self._queue(slot, starting=True)

    # -- who asks -----------------------------------------------------------------------------------------------

    def find(self, model_id: str) -> Slot:
        """Return the slot that serves the id of an entry or an adapter: the newest ready one, else the newest.

        Raises:
            ModelNotFound: nothing has this id; names what exists.
        """
        found = self._of(model_id) or [slot for slot in self._serving() if model_id in slot.config.adapter_ids]
        if not found:
            known = ", ".join(
                sorted({name for slot in self._serving() for name in (slot.id, *slot.config.adapter_ids)})
            )
            raise ModelNotFound(f"the model {model_id!r} does not exist; there is: {known}.", param="model")
        return next((slot for slot in reversed(found) if slot.state == "ready"), found[-1])

    def claim(self, model_id: str, now: float, *, insist: bool = False) -> Slot:
        """Count a user of a model, which is loaded if it is not; undone by `release`.

        Args:
            insist: try again what has failed, and wait as long as it takes.

        Raises:
            ModelNotFound: as `find`.
            ModelLoading: it loads since the server has started.
            QueueFull: as many requests wait for it as it will take.
            EngineDead: it could not be loaded, or the server stops.
        """
        slot = self.find(model_id)
        self._check_running()
        if not insist:
            self._check_claim(slot)
        slot.users += 1
        slot.last_used = now
        self._want(slot, insist=insist)
        return slot

    def _check_running(self) -> None:
        if self._stopped:
            raise EngineDead("the server is shutting down")

    def _check_claim(self, slot: Slot) -> None:
        if slot.state == "failed" and not slot.may_succeed_later:
            assert slot.error is not None
            raise EngineDead(f"{slot.id} could not be loaded: {slot.error.message.removeprefix(f'{slot.id}: ')}")
        if slot.starting:
            raise ModelLoading(f"{slot.id} is loading ({slot.detail}).")
        limit = slot.config.max_sequences + slot.config.max_queue
        if slot.state != "ready" and slot.users >= limit:
            raise QueueFull(f"{slot.users} requests wait for {slot.id} to be loaded; it takes {limit}.", limit=limit)

    def release(self, slot: Slot, now: float) -> None:
        """A request is over, or waits no longer."""
        assert slot.users > 0
        slot.users -= 1
        slot.last_used = now

    def ask(self, model_id: str) -> Slot:
        """Have a model loaded that nobody waits for. Raises: `ModelNotFound`; EngineDead: the server stops."""
        slot = self.find(model_id)
        self._check_running()
        if slot.state not in ("loading", "ready"):
            slot.asked = True
            self._want(slot, insist=True)
        return slot

    def dismiss(self, model_id: str) -> Slot:
        """Begin to unload a model that nobody uses; one that has failed or died becomes unloaded.

        Raises:
            ModelNotFound: as `find`.
            ModelInUse: it serves requests, or is being loaded.
            EngineDead: the server stops.
        """
        slot = self.find(model_id)
        self._check_running()
        if slot.users:
            raise ModelInUse(f"{slot.id} has {slot.users} requests, and is not unloaded under them.", users=slot.users)
        if slot.state in ("waiting", "loading"):
            raise ModelInUse(f"{slot.id} is being loaded ({slot.detail}).", users=0)
        if slot.state == "ready":
            self._unload(slot, "unloaded by request")
        elif slot.state in ("failed", "dead"):
            slot.state, slot.detail, slot.error, slot.due = "unloaded", "unloaded by request", None, None
        slot.required = False
        return slot

    def _want(self, slot: Slot, *, insist: bool) -> None:
        """Queue a slot that is neither loaded nor about to be."""
        if insist:
            slot.deaths = 0
        if slot.state in ("unloaded", "failed") or (insist and slot.state == "dead"):
            self._queue(slot)

    # -- what happened ------------------------------------------------------------------------------------------

    def opened(self, slot: Slot, held: int, now: float) -> None:
        """A model is loaded and takes `held` bytes. Those that it replaces serve no new requests."""
        assert slot.state == "loading"
        slot.state, slot.detail, slot.error, slot.due = "ready", "ready", None, None
        slot.asked = slot.starting = False
        slot.required = slot.config.load == "at_start"
        slot.held, slot.since, slot.last_used = held, now, now
        if not slot.retired:
            for older in self._of(slot.id)[:-1]:
                self.retire(older)
        self._memory_changed()

    def failed(self, slot: Slot, error: VerbatimError) -> None:
        """A model could not be loaded. For want of memory it is tried again, once another one has left."""
        assert slot.state == "loading"
        slot.error, slot.detail = error, error.message
        if isinstance(error, NotEnoughMemory) and not slot.retired:
            self._memory_changed()
            slot.state, slot.short = "waiting", True  # its number stays: it is the first in the queue
            return
        slot.state, slot.asked, slot.starting = "failed", False, False
        if slot.retired:
            self.slots.remove(slot)
        self._memory_changed()

    def died(self, slot: Slot, error: VerbatimError, now: float) -> None:
        """A loaded model has stopped by itself; its requests have ended with this error."""
        if slot.state != "ready":
            return  # it was about to leave anyhow
        if now - slot.since > LONG_LIFE:
            slot.deaths = 0
        slot.deaths += 1
        slot.error, slot.held = error, 0
        if slot.retired or self._superseded(slot):
            slot.state, slot.retired = "dead", True
            self.slots.remove(slot)
        elif slot.deaths > len(PAUSES):
            slot.state = "failed"
            slot.detail = f"it has died {slot.deaths} times: {error.message}"
            slot.error = EngineDead(slot.detail)
        else:
            pause = PAUSES[slot.deaths - 1]
            slot.state, slot.due = "dead", now + pause
            slot.detail = f"{error.message.rstrip('.')}; it is loaded again in {pause:g} s"
        self._memory_changed()

    def unloaded(self, slot: Slot) -> None:
        """The engine of a slot is closed."""
        assert slot.state == "unloading"
        slot.state, slot.held, slot.error = "unloaded", 0, None
        if slot.retired or self._superseded(slot):
            slot.retired = True
            self.slots.remove(slot)
        elif slot.users or slot.asked:
            self._queue(slot)
        self._memory_changed()

    def stop(self) -> None:
        """Nothing is loaded any more."""
        self._stopped = True

    def _memory_changed(self) -> None:
        for slot in self.slots:
            slot.short = False

    # -- a changed configuration --------------------------------------------------------------------------------

    def apply(self, configs: Sequence[ModelConfig]) -> Changes:
        """Take over a changed configuration: only what differs changes, and requests that run are not touched."""
        changes = Changes()
        wanted = {config.id: config for config in configs}
        for slot in list(self.slots):
            if slot.id not in wanted and not slot.retired:
                self.retire(slot)
                changes.removed += [slot.id] * (slot.id not in changes.removed)
        for config in configs:
            found = self._of(config.id)
            if not found:
                self._add(config, starting=True)
                changes.added.append(config.id)
            elif differs_only_in_place(found[-1].config, config):
                self._change_in_place(found[-1], config, changes)
            else:
                self._replace(found, config)
                changes.replaced.append(config.id)
        self._order = [config.id for config in configs]
        return changes

    def _add(self, config: ModelConfig, *, starting: bool) -> None:
        slot = Slot(config, detail="loaded on demand")
        self.slots.append(slot)
        if config.load == "at_start":
            slot.required = True
            self._queue(slot, starting=starting)

    def _change_in_place(self, slot: Slot, config: ModelConfig, changes: Changes) -> None:
        before, slot.config = slot.config, config
        if before != config:
            changes.in_place.append(slot.id)
            slot.required = config.load == "at_start"
            if slot.required and slot.state == "unloaded":
                self._queue(slot)
        if slot.state == "failed":
            changes.tried_again.append(slot.id)
            slot.state, slot.error, slot.deaths, slot.detail = "unloaded", None, 0, "loaded on demand"
            if config.load == "at_start" or slot.users:
                self._queue(slot, starting=not (slot.since or slot.users))

    def _replace(self, older: list[Slot], config: ModelConfig) -> None:
        """Make a new slot. What is ready serves until the new one is, or until its memory is needed."""
        stays = config.load == "at_start" and any(slot.state == "ready" for slot in older)
        for slot in older:
            if not stays or slot.state != "ready":
                self.retire(slot)
        self._add(config, starting=False)

    def retire(self, slot: Slot) -> None:
        """Take a slot out of service: what is loaded leaves once nobody uses it."""
        slot.retired = True
        if slot.idle:
            self._unload(slot, "its entry was removed or replaced")
        elif slot.state not in OCCUPYING:
            self.slots.remove(slot)

    # -- what is to be done -------------------------------------------------------------------------------------

    def plan(self, free: int | None, now: float) -> None:
        """Decide what is to be done now. `free`: bytes of memory; None: not known."""
        if self._stopped:
            return
        for slot in list(self.slots):
            self._expire(slot, now)
        self._shrink()
        for slot in sorted((slot for slot in self.slots if slot.state == "waiting"), key=lambda slot: slot.number):
            if not self._advance(slot, free):
                break

    def next_due(self) -> float | None:
        """Return when `plan` is to be called if nothing happens before; None: never."""
        dues = [slot.due for slot in self.slots if slot.state == "dead" and slot.due is not None]
        idle = [(slot.last_used, slot.config.idle_seconds) for slot in self.slots if slot.idle]
        dues += [last + limit for last, limit in idle if limit is not None]
        return min(dues, default=None)

    def _expire(self, slot: Slot, now: float) -> None:
        if slot.state == "dead" and slot.due is not None and slot.due <= now:
            self._queue(slot)
        elif slot.idle and slot.retired:
            self._unload(slot, "its entry was removed or replaced")
        elif slot.idle and (limit := slot.config.idle_seconds) is not None and now - slot.last_used >= limit:
            self._unload(slot, f"unloaded after {limit:g} s without a request")

    def _shrink(self) -> None:
        """Unload idle models where `max_loaded` was lowered."""
        loaded = [slot for slot in self.slots if slot.state in ("loading", "ready")]
        idle = sorted((slot for slot in loaded if slot.idle), key=lambda slot: slot.last_used)
        for slot in idle[: max(0, len(loaded) - (self.max_loaded or len(loaded)))]:
            self._unload(slot, f"unloaded: max_loaded is {self.max_loaded}")

    def _advance(self, slot: Slot, free: int | None) -> bool:
        """Load the first slot of the queue, refuse it, or make room for it. False: those behind it wait with it."""
        loading = [other for other in self.slots if other.state == "loading"]
        shared = not slot.has_own_process and any(not other.has_own_process for other in loading)
        blind = slot.needed is None or any(other.needed is None for other in loading)
        if shared or (loading and blind) or len(loading) >= SIDE_BY_SIDE:
            return False
        lacks_memory = slot.short or self._lacks_memory(slot, free, loading)
        occupied = sum(other.state in OCCUPYING for other in self.slots)
        if not lacks_memory and (self.max_loaded is None or occupied < self.max_loaded):
            slot.state, slot.detail = "loading", "loading"
            self.actions.append(Load(slot))
            return True
        if loading or any(other.state == "unloading" for other in self.slots):
            return False
        return self._make_room(slot, free, lacks_memory=lacks_memory)

    @staticmethod
    def _lacks_memory(slot: Slot, free: int | None, loading: Sequence[Slot]) -> bool:
        """Compare needed with free memory. What models that are being loaded will take counts as taken."""
        if slot.needed is None or free is None:
            return False
        return slot.needed > free - sum(other.needed or 0 for other in loading)

    def _make_room(self, slot: Slot, free: int | None, *, lacks_memory: bool) -> bool:
        for older in self._of(slot.id):
            if older is not slot:
                self.retire(older)
        if any(other.retired for other in self.slots):
            return False  # they leave once their requests have ended
        idle = sorted((other for other in self.slots if other.idle), key=lambda other: other.last_used)
        if not slot.demanded or not idle or (lacks_memory and not slot.short and _hopeless(slot, free, idle)):
            self._refuse(slot, free, lacks_memory=lacks_memory)
            return True
        self._unload(idle[0], f"unloaded to make room for {slot.id}")
        return False

    def _refuse(self, slot: Slot, free: int | None, *, lacks_memory: bool) -> None:
        holders = [other for other in self.slots if other.state in OCCUPYING]
        slot.error = refusal(slot, holders, free, self.max_loaded, lacks_memory=lacks_memory)
        slot.state = "failed" if slot.required else "unloaded"
        slot.detail = slot.error.message
        slot.asked = slot.starting = slot.short = False
        self.actions.append(Refused(slot))

    def _queue(self, slot: Slot, *, starting: bool = False) -> None:
        slot.state, slot.detail, slot.starting = "waiting", "waiting for its turn", starting
        slot.number, slot.error, slot.due, slot.short = next(self._numbers), None, None, False

    def _unload(self, slot: Slot, why: str) -> None:
        assert slot.idle
        slot.state, slot.detail, slot.required = "unloading", why, False
        self.actions.append(Unload(slot))

    # -- looking at it ------------------------------------------------------------------------------------------

    def _of(self, model_id: str) -> list[Slot]:
        return [slot for slot in self._serving() if slot.id == model_id]

    def _serving(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.retired]

    def _superseded(self, slot: Slot) -> bool:
        """Whether a newer slot has the same id: then this one only stays while it is ready."""
        return self._of(slot.id)[-1:] != [slot]

    def shown(self) -> list[Slot]:
        """Return the slot that serves each id, in the order of the configuration."""
        return [self.find(model_id) for model_id in self._order]

    @property
    def starting(self) -> bool:
        """Whether a model that is loaded at start is still waited for."""
        return any(slot.starting for slot in self.slots)

    def check(self) -> None:
        """Check what must hold between any two calls, for tests."""
        for slot in self.slots:
            assert slot.users >= 0
            assert not slot.retired or slot.state in OCCUPYING
            assert slot.state != "dead" or slot.due is not None
            assert slot.state != "failed" or slot.error is not None
            assert not slot.starting or slot.state in ("waiting", "loading")
        assert {slot.id for slot in self.slots if not slot.retired} == set(self._order)


def _hopeless(slot: Slot, free: int | None, idle: Sequence[Slot]) -> bool:
    """Whether not even the memory of all idle models would be enough, as far as it is known."""
    if slot.needed is None or free is None or not all(other.held for other in idle):
        return False
    return slot.needed > free + sum(other.held for other in idle)

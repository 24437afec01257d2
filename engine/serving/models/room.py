"""Say why there is no room for a model: what it needs, what is free, and who holds the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from engine.errors import NoRoom, NotEnoughMemory
from engine.host_memory import format_bytes
from engine.serving.models.slot import Slot

__all__ = ["refusal", "told_to"]

_LOADED: Final = "; loaded: "


def refusal(slot: Slot, holders: Sequence[Slot], free: int | None, most: int | None, *, lacks_memory: bool) -> NoRoom:
    """Return the error that those get who wait for a model that does not fit.

    Args:
        holders: the slots that take memory.
        most: models that may be loaded at once.
        lacks_memory: False where their number is what forbids it.
    """
    needed = slot.needed
    if isinstance(slot.error, NotEnoughMemory):  # loading has found out more than was known before
        needed, free = slot.error.details.get("needed", needed), slot.error.details.get("free", free)
    if not lacks_memory:
        why = f"{slot.id} is not loaded, and max_loaded allows {most} models at once"
    elif needed is None or free is None:
        why = f"there is not enough memory to load {slot.id}"
    else:
        why = f"{slot.id} needs {format_bytes(needed)} of memory, {format_bytes(free)} are free"
    held = [{"id": other.id, "memory_bytes": other.held, "requests": other.users} for other in holders]
    return told_to(NoRoom(why, needed=needed, free=free, holders=held), lambda _: True)


def told_to(error: NoRoom, may_see: Callable[[str], bool]) -> NoRoom:
    """Return the same error for somebody who may know of some models only: others are counted and not named."""
    why = error.message.partition(_LOADED)[0].removesuffix(".")
    holders = error.details["holders"]
    seen = [one for one in holders if may_see(one["id"])]
    named = [_named(one) for one in seen]
    if hidden := len(holders) - len(seen):
        named.append(f"{hidden} other model{'s' * (hidden > 1)}")
    told = f"{why}{_LOADED}{', '.join(named)}." if named else f"{why}."
    return NoRoom(told, **{**error.details, "holders": seen})


def _named(holder: dict[str, object]) -> str:
    takes = f"{format_bytes(int(str(holder['memory_bytes'])))}, " if holder["memory_bytes"] else ""
    return (
        f"{holder['id']} ({takes}{holder['requests']} requests)"
        if holder["requests"]
        else (f"{holder['id']} ({takes}idle)")
    )

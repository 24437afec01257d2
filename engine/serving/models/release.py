"""Give a closed model's memory back to the system, where it was loaded in this process."""

from __future__ import annotations

import gc

from engine.host_memory import give_back_memory
from engine.serving.models.slot import Slot

__all__ = ["give_back_after"]


def give_back_after(slot: Slot) -> None:
    """Collect what is left of a model whose engine is closed. A process of its own has taken its memory along.

    Models have circles of references. Objects that were frozen (`gc.freeze`) are collected, too, and what remains is
    frozen again: a full collection stops all threads for some tenths of a second, which a request may notice.
    """
    if slot.has_own_process:
        return
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    give_back_memory()

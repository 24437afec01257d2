"""One engine of a slot: who makes it, how long it lives, what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.config import ModelConfig
from engine.errors import VerbatimError
from engine.serving.opening import Progress
from engine.serving.protocol import EngineProtocol

__all__ = ["Life", "Opener", "Stopped", "held_bytes"]


class Opener(Protocol):
    """Loads a model and starts its engine, as `open_engine`."""

    def __call__(
        self,
        config: ModelConfig,
        *,
        pull: bool,
        progress: Progress,
        beside: Sequence[object],
        on_death: Callable[[VerbatimError], None],
    ) -> EngineProtocol: ...


class Stopped(Exception):
    """A load is not wanted any more."""


@dataclass(slots=True)
class Life:
    """One engine of a slot, from the beginning of its load. `death`: why it has stopped by itself."""

    death: VerbatimError | None = None


def held_bytes(engine: EngineProtocol) -> int:
    """Bytes that a loaded model takes; 0 where that is not known, because it shares a process."""
    return int(engine.stats().resident_bytes)

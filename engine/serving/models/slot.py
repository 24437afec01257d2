"""`Slot`: the place of one entry's model, and the states it goes through. Plain data: knows no engine and no clock.

unloaded ──▶ waiting ──▶ loading ──▶ ready ──▶ unloading ──▶ unloaded
                ▲           │          │
                │           ▼          ▼
                │         failed      dead ──(a pause)──▶ waiting; after too many deaths: failed
                └───────────┘ somebody insists
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from engine.config import ModelConfig
from engine.errors import LoadInterrupted, NoRoom, NotEnoughMemory, VerbatimError
from engine.types.model_info import LoadProgress

__all__ = ["IN_PLACE", "OCCUPYING", "Slot", "State", "differs_only_in_place"]

State = Literal["waiting", "loading", "ready", "unloading", "unloaded", "failed", "dead"]

OCCUPYING: Final = frozenset({"loading", "ready", "unloading"})
"""States in which a model takes memory, or may."""

IN_PLACE: Final = frozenset({"load", "idle_seconds", "max_load_seconds"})
"""Keys of an entry that change nothing about a loaded model."""


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one entry's model.

    Attributes:
        detail: progress while it loads; otherwise why it is in this state.
        progress: how far the checkpoint's files were read while it loads.
        users: requests that wait for the model or are answered by it. It never leaves while there are any.
        number: its place in the queue while it waits: lower ones first.
        asked: somebody wants it loaded who does not wait for it.
        starting: it loads because the server has started; requests are refused until then, and do not wait.
        required: the server is not ready without it.
        retired: its entry was removed or replaced; it leaves once nobody uses it.
        short: memory ran out when it was loaded; nothing has changed since.
        needed: bytes that loading takes, as far as they are known beforehand.
        held: bytes that the loaded model takes; 0 where that is not known.
        last_used: when the last request came or went, in seconds of the caller's clock; `since`: when it became ready.
        deaths: how often it has died without a long life between; `due`: when a dead one is loaded again.
        error: why it failed, or why it was refused to those who wait.
    """

    config: ModelConfig
    state: State = "unloaded"
    detail: str = ""
    progress: LoadProgress | None = None
    users: int = 0
    number: int = 0
    asked: bool = False
    starting: bool = False
    required: bool = False
    retired: bool = False
    short: bool = False
    needed: int | None = None
    held: int = 0
    last_used: float = 0.0
    since: float = 0.0
    deaths: int = 0
    due: float | None = None
    error: VerbatimError | None = field(default=None, repr=False)

    @property
    def id(self) -> str:
        return self.config.id

    @property
    def demanded(self) -> bool:
        """Whether somebody wants it now, so that others may leave for it."""
        return self.users > 0 or self.asked

    @property
    def idle(self) -> bool:
        """Whether it is loaded and nobody uses it."""
        return self.state == "ready" and not self.users

    @property
    def has_own_process(self) -> bool:
        """Whether it is loaded in a process of its own. Libraries have global state that loads would share."""
        return self.config.isolation == "process"

    @property
    def may_succeed_later(self) -> bool:
        """Whether it failed for want of room, or was ended while it loaded: both may be otherwise another time."""
        return isinstance(self.error, LoadInterrupted | NotEnoughMemory | NoRoom)

    @property
    def answers_waiters(self) -> bool:
        """Whether those who wait for it have an answer: it is ready, failed, refused, or will never be loaded."""
        if self.state in ("ready", "failed"):
            return True
        return (self.state == "unloaded" and self.error is not None) or (self.retired and self.state not in OCCUPYING)


def differs_only_in_place(one: ModelConfig, other: ModelConfig) -> bool:
    """Tell whether two entries differ in nothing but keys that change nothing about a loaded model."""
    return one.model_copy(update={key: getattr(other, key) for key in IN_PLACE}) == other

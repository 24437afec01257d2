"""What a model's process is told and tells, beside the commands and events of `engine.serving.protocol`. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Final

from engine.config import ModelConfig
from engine.errors import VerbatimError
from engine.serving.protocol import Command, Event
from engine.serving.transport import Verb
from engine.types.model_info import EngineStats, LoadProgress, ModelInfo

__all__ = [
    "Answered",
    "Ask",
    "FromChild",
    "Load",
    "Loaded",
    "Logged",
    "NotLoaded",
    "Progressed",
    "Stepped",
    "ToChild",
    "counters_of",
    "is_busy",
    "stats_of",
]


@dataclass(frozen=True, slots=True)
class Load:
    """The first message to a process: load this entry. `log_level`: of what the parent writes into its log."""

    config: ModelConfig
    pull: bool
    beside: Sequence[Mapping[str, int]]
    log_level: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Call a function of the preparer. Answered by `Answered` with the same number."""

    number: int
    verb: Verb
    argument: Any


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far the load is."""

    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class Logged:
    """A record for the parent's log. `trace`: lines of a traceback, without words that may quote a request."""

    name: str
    level: int
    created: float
    message: str
    fields: Mapping[str, Any]
    trace: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is loaded, and its engine takes commands."""

    info: ModelInfo
    step_bytes: Mapping[str, int]
    counters: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """The model cannot be loaded; the process ends."""

    error: VerbatimError


@dataclass(frozen=True, slots=True)
class Answered:
    """What a function has returned; or what it has raised, if `error` is not None."""

    number: int
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Stepped:
    """What has happened in the engine, and its counters afterwards.

    Attributes:
        event: None after a step without one.
        counters: see `counters_of`.
        taken: how many commands the engine has taken so far.
    """

    event: Event | None
    counters: tuple[Any, ...] = field(repr=False)
    taken: int


ToChild = Load | Ask | Command
FromChild = Progressed | Logged | Loaded | NotLoaded | Answered | Stepped

_COUNTERS: Final = tuple(item.name for item in fields(EngineStats))
_WAITING: Final = _COUNTERS.index("waiting")
_RUNNING: Final = _COUNTERS.index("running")

counters_of = attrgetter(*_COUNTERS)
"""Return the values of an `EngineStats` as a tuple: they travel after every step, and are read once in a while."""


def is_busy(counters: tuple[Any, ...]) -> bool:
    """Return whether requests run or wait."""
    return bool(counters[_WAITING] or counters[_RUNNING])


def stats_of(counters: tuple[Any, ...]) -> EngineStats:
    """Turn them back."""
    return EngineStats(**dict(zip(_COUNTERS, counters, strict=True)))

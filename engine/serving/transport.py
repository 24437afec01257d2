"""`Transport`: how an engine is reached from the event loop: on a thread, or in a process of its own. Plain data only.

EngineClient ──send: Submit, Abort, Close──▶            never waits
             ──ask: prepare, tokenize, …───▶ engine     answered through a Future
             ◀──listen: Outputs, Aborted, Ended──       in the order in which they happened
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal, Protocol

from engine.serving.protocol import Command, Event
from engine.types.model_info import EngineStats, ModelInfo

__all__ = ["LAST_STEP", "PREPARING", "Listener", "Transport", "Verb"]

Verb = Literal["prepare", "tokenize", "detokenize", "tokenizer_info", "token_text"]
"""What may be asked of an engine beside the requests that it runs."""

Listener = Callable[[Event], None]

LAST_STEP = 5.0
"""Seconds that a step may take on when the engine is told to stop."""

PREPARING = 3
"""Requests of one model that are prepared at once: two heavy ones of a key, and one of anybody else."""


class Transport(Protocol):
    """One running engine, wherever it runs. Every method may be called from any thread."""

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""

    @property
    def step_bytes(self) -> Mapping[str, int]:
        """The most memory that a step takes beside weights and cache, by the name of each GPU."""

    @property
    def busy_since(self) -> float | None:
        """Monotonic seconds at which the step under way began, as far as it is known here; None: nothing is to do."""

    def start(self, listen: Listener) -> None:
        """Begin to hand over events, on a thread of the transport. `Ended` is the last one, and always comes."""

    def send(self, command: Command) -> None:
        """Queue a command. Does nothing once the engine has ended."""

    def ask(self, verb: Verb, argument: Any) -> Future[Any]:
        """Call a function of the engine's preparer elsewhere than on this thread; at most `PREPARING` at once.

        The future fails with what the function raises, and with EngineDead if the engine ends first.
        """

    def stats(self) -> EngineStats:
        """The engine's counters after its last step or command, as far as they are known here."""

    def close(self) -> bool:
        """Stop after the step under way, and free everything. Safe to call twice. False: it did not end in time."""

"""What stands between an engine and whoever uses it: its verbs, and the messages that carry those of the loop.

caller ──Submit, Abort, Close──▶ engine          plain, picklable data both ways: a queue, a pipe or an actor can
       ◀──Outputs, Aborted, Ended──              carry them, and `EngineLoop` obeys them wherever it runs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.errors import VerbatimError
from engine.serving.request_stream import RequestStream
from engine.types.model_info import EngineStats, ModelInfo, TokenizerInfo
from engine.types.outputs import RequestOutput, Usage
from engine.types.requests import GenerationRequest, PreparedRequest, TokenizedPrompt

__all__ = ["Abort", "Aborted", "Close", "Command", "Ended", "EngineProtocol", "Event", "Outputs", "Submit"]


class EngineProtocol(Protocol):
    """One model that serves many requests, wherever it runs."""

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""

    @property
    def step_bytes(self) -> Mapping[str, int]:
        """The most memory that a step takes beside weights and cache, by the name of each GPU; empty on a CPU."""

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Turn a request into tokens and complete parameters, or refuse it.

        Raises:
            RequestError: it cannot be served as it is; the error names the field.
            EngineDead: the engine has stopped.
        """

    async def tokenize(self, request: GenerationRequest) -> TokenizedPrompt:
        """Return the tokens of a request's prompt: those that `prepare` makes, also where they are too many.

        Raises: as `prepare`.
        """

    async def detokenize(self, tokens: Sequence[int], group: str = "") -> str:
        """Return the text of some tokens, special tokens as their names.

        Raises: as `prepare`.
        """

    async def tokenizer(self) -> TokenizerInfo:
        """Describe the model's tokenizer.

        Raises:
            EngineDead: the engine has stopped.
        """

    def submit(self, request: PreparedRequest) -> RequestStream:
        """Queue a prepared request.

        Raises:
            QueueFull: as many requests as may run and wait are unfinished.
            EngineDead: the engine has stopped.
        """

    def token_text(self, token_id: int) -> str:
        """Return a token as text, or as `bytes:…` if it is no complete text by itself.

        May wait for another process: not for an event loop.

        Raises:
            EngineDead: the engine has stopped.
        """

    def abort(self, request_id: str) -> None:
        """Free a request's place before the next step. Does nothing if the request is gone."""

    def stats(self) -> EngineStats:
        """A snapshot of what runs."""

    def close(self) -> bool:
        """Stop. Safe to call twice. False if the engine did not end and was left behind."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Queue a prepared request."""

    request: PreparedRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget a request. Answered by `Aborted`."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Close:
    """Stop after the step under way. Answered by `Ended`."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one step did."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class Aborted:
    """The engine has let go of a request. `usage`: what it had used; None if it was gone already."""

    request_id: str
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine has stopped; nothing follows. `error`: what every unfinished and every later request is told."""

    error: VerbatimError


Command = Submit | Abort | Close
Event = Outputs | Aborted | Ended

"""What the engine returns step by step: `RequestOutput`, its deltas, and token counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from engine.errors import VerbatimError
from engine.types.messages import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]

NEGATIVE_INFINITY_LOGPROB: Final = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot write (as in the OpenAI API)."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """An alternative. `token` is text, or `bytes:\\xe2\\x80` for an incomplete character; `bytes`: its true bytes."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token. A special token that adds no text (an end token) has empty `bytes`."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one step added to one choice. The deltas of all steps, joined, are the whole reply."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls completed in this step."""
    schema_error: str | None = None
    """With the finish reason, where a schema could not be enforced whole: why the text is not valid; empty if it is."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a request has used."""

    prompt_tokens: int
    completion_tokens: int
    """Over all choices."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One step's result for one request. `finished` is set exactly once, on the last output; `error` only there."""

    request_id: str
    deltas: tuple[ChoiceDelta, ...]
    usage: Usage
    finished: bool = False
    error: VerbatimError | None = None


def clean_logprob(value: float) -> float:
    """Return a log-probability that JSON can write."""
    return value if math.isfinite(value) else NEGATIVE_INFINITY_LOGPROB

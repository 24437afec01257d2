"""What comes back step by step: `RequestOutput`, its deltas, and what was used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from engine.errors import VerbatimError
from engine.types.messages import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]

NEGATIVE_INFINITY_LOGPROB: Final = -9999.0
"""What a log-probability of minus infinity is written as: JSON has no infinities (the OpenAI API does the same)."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """`token` is text, or `bytes:\\xe2\\x80` for a token that is no whole character; `bytes` its true bytes."""

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
    """What one step added to one choice. Joined over all steps they are the whole answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that became whole in this step."""
    schema_error: str | None = None
    """With the finish reason, where a schema could not be enforced whole: why the text is not valid; empty if it is."""


@dataclass(frozen=True, slots=True)
class Usage:
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
    """What one step did for one request. `finished` is set exactly once, on the last output; `error` only there."""

    request_id: str
    deltas: tuple[ChoiceDelta, ...]
    usage: Usage
    finished: bool = False
    error: VerbatimError | None = None


def clean_logprob(value: float) -> float:
    """A log-probability as JSON can carry it."""
    return value if math.isfinite(value) else NEGATIVE_INFINITY_LOGPROB

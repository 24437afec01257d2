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
    rank: int | None = None
    """Of a prompt token: 1 for the likeliest token at its place, 2 for the next. Not counted for generated tokens."""


@dataclass(frozen=True, slots=True)
class TokenCheck:
    """What the model says at one drawn position of a reply that is checked.

    Attributes:
        expected: the reply's token.
        drawn: the token that the model draws here.
        logprob: the raw log-probability of `expected`, rounded to float32.
        perturbed: the perturbed score of `expected`, rounded to float32; -inf where it could not be drawn at all.
        closeness: 0 where both are the same token. Else by how much scores would have to change for `expected` to be
            drawn, in units of the perturbed score (of the logits at temperature 0); infinite where no rounding could
            (a grammar or a bias forbids it).
    """

    expected: int
    drawn: int
    logprob: float
    perturbed: float
    closeness: float = 0.0


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
    scores: tuple[tuple[float, float], ...] = ()
    """For a request that is recorded: the raw log-probability and the perturbed score of each token that was drawn,
    rounded to float32. The perturbed score is what the draw maximises: `(logit - largest) / temperature + gumbel`, and
    the processed logit at temperature 0. Tokens that are forced may be taken without a draw; those have no scores."""
    margins: tuple[float | None, ...] | None = None
    """Per token, if asked for: how far the best perturbed score was ahead of the second best; None where there was no
    other token to choose."""
    checks: tuple[TokenCheck, ...] = ()
    """For a reply that is checked: one for each position that was drawn."""
    goes_on: bool = False
    """With the finish reason of a reply that is checked: its tokens end, but the model would not have ended here."""
    schema_error: str | None = None
    """With the finish reason, where a schema could not be enforced whole: why the text is not valid; empty if it is."""
    stop_string: str | None = None
    """With the finish reason: the stop string that ended the text; None if something else did."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a request has used."""

    prompt_tokens: int
    completion_tokens: int
    """Over all choices."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    """Tokens of the prediction that the replies hold, in the order of both. A property of the two texts: not of how
    much of it was really tried as a draft."""
    rejected_prediction_tokens: int = 0
    """The prediction's other tokens, for each choice."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One step's result for one request. `finished` is set exactly once, on the last output; `error` only there."""

    request_id: str
    deltas: tuple[ChoiceDelta, ...]
    usage: Usage
    finished: bool = False
    error: VerbatimError | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """On one output of a request that asks for them, the one that follows the last chunk of its prompt: one entry per
    prompt token, None for the first, before which there is nothing."""
    queued_seconds: float | None = None
    """On a request's first output, where an `EngineLoop` runs it: how long it waited until its first step began."""


def clean_logprob(value: float) -> float:
    """Return a log-probability that JSON can write."""
    return value if math.isfinite(value) else NEGATIVE_INFINITY_LOGPROB

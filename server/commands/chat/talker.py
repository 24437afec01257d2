"""What answers in a conversation: the interface, a reply with everything by which it can be had again, and comparison.

Knows no terminal, no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = ["Message", "Piece", "Reply", "Replying", "Talker", "difference", "rate"]


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has just been generated: `thought` tells whether it belongs to the thoughts."""

    text: str
    thought: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply.

    Attributes:
        tokens: text and log-probability of each generated token, as far as they are told.
        finish_reason: `stop`, `length` or `tool_calls`.
    """

    text: str
    thoughts: str
    seed: int
    fingerprint: str
    tokens: tuple[tuple[str, float], ...]
    completion_tokens: int
    finish_reason: str
    ids: tuple[int, ...] = field(default=())


Replying = Generator[Piece, None, Reply]


class Talker(Protocol):
    """A model that answers."""

    @property
    def name(self) -> str:
        """The model's id."""

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint; empty if it is not known before the first reply."""

    def reply(self, messages: Sequence[Message], seed: int | None) -> Replying:
        """Yield a reply piece by piece and return it whole. Closing the generator ends the reply.

        `seed`: None draws one.

        Raises:
            VerbatimError: the request is refused, or the model fails.
        """

    def close(self) -> None:
        """Free the model."""


def difference(first: Reply, second: Reply) -> str | None:
    """Say where two replies to the same request differ first; None if they are the same bit for bit."""
    for number, (one, other) in enumerate(zip(first.tokens, second.tokens, strict=False), 1):
        if one[0] != other[0]:
            return f"token {number} was {one[0]!r} and is {other[0]!r}"
        if one[1] != other[1]:
            return f"the log-probability of token {number}, {one[0]!r}, was {one[1]!r} and is {other[1]!r}"
    if len(first.tokens) != len(second.tokens):
        return f"there were {len(first.tokens)} tokens and are {len(second.tokens)}"
    if (first.text, first.thoughts, first.ids) != (second.text, second.thoughts, second.ids):
        return "the tokens have the same texts, and the replies differ"
    if first.fingerprint != second.fingerprint:
        return f"the replies are the same, but the fingerprint was {first.fingerprint} and is {second.fingerprint}"
    return None


def rate(tokens: int, seconds: float) -> str:
    """Return tokens per second, or nothing where there are too few to tell."""
    if tokens < 2 or seconds <= 0:
        return ""
    speed = tokens / seconds
    return f"{speed:.0f} tokens/s" if speed >= 10 else f"{speed:.1f} tokens/s"

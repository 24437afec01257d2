"""Delimiters, the texts before and after thoughts and tool calls: how they are matched in a reply. No tokens, no torch.

White space in a delimiter matches any white space, since models vary it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

__all__ = ["SPACE", "TAG", "begins", "end_of", "has_begun", "literal", "overlap", "pattern", "shared"]

TAG: Final = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,}\]")
"""A tag, as models write them around what is not plain text: `<tool_call>`, `[TOOL_CALLS]`."""

SPACE: Final = re.compile(r"\s*")


def overlap(text: str, delimiter: str) -> int:
    """Return how many of the last characters of a text are the beginning of a delimiter that may still follow."""
    sizes = range(min(len(delimiter) - 1, len(text)), 0, -1)
    return next((size for size in sizes if delimiter.startswith(text[-size:])), 0)


def pattern(*parts: str) -> re.Pattern[str]:
    """Compile literal texts, and named groups `(?P<…>…)` between them, into one expression."""
    made = []
    for part in parts:
        if part.startswith("(?P<"):
            made.append(part)
        else:
            made.append(r"\s*".join(re.escape(piece) for piece in re.split(r"\s+", part)))
    return re.compile(r"\s*" + "".join(made), re.DOTALL)


def literal(delimiter: str) -> re.Pattern[str]:
    """Compile a delimiter into an expression."""
    return re.compile(r"\s*".join(re.escape(piece) for piece in delimiter.split()))


def end_of(delimiter: str, text: str, at: int) -> int | None:
    """Return where the delimiter ends that begins at `at`, after any white space; None if another text is there."""
    match = literal(delimiter).match(text, SPACE.match(text, at).end())  # type: ignore[union-attr]
    return match.end() if match else None


def begins(delimiter: str, text: str, at: int) -> bool:
    """Return whether the text from `at` on is an incomplete delimiter, after any white space."""
    if len(text) - at > 4 * len(delimiter) + 256:
        return False  # no delimiter has so much white space
    rest, whole = "".join(text[at:].split()), "".join(delimiter.split())
    return len(rest) < len(whole) and whole.startswith(rest)


def has_begun(text: str, begin: str, opening: str) -> bool | None:
    """Return whether a text goes on behind an opening, with `begin` before it or without; None if it may yet.

    White space is free.
    """
    written, possible = "".join(text.split()), False
    for whole in ("".join((begin + opening).split()), "".join(opening.split())):
        if written.startswith(whole) and len(written) > len(whole):
            return True
        possible = possible or whole.startswith(written)
    return None if possible else False


def shared(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the common beginning of two texts or lists."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count

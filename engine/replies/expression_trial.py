"""Tries a response template's expressions in a child process, on texts made of their own letters.

A response template comes with a checkpoint and is not trusted. On a text of eighty characters an expression such as
`(?:a|b|ab)*c` takes longer than anybody waits. Where the system has no such processes (Windows) nothing is tried, and
such a search ends its reply with an error. Knows no tokens, no model, no HTTP.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import regex  # type: ignore[import-untyped]

from engine.confined.process import AVAILABLE, Confined, ConfinedError, ConfinedFault
from engine.errors import LoadError

__all__ = ["check", "search"]

SECONDS: Final = 5.0
"""Seconds of processor time. Published expressions take 0.05 s."""
MEMORY: Final = 1 << 30
LENGTH: Final = 120
"""Characters of the repeated part: an expression of cubic time passes, one of exponential time does not."""
_LETTERS: Final = 16
_RUN: Final = regex.compile(r"(?:\\[^\w]|[^\\()\[\]{}.*+?^$|])+")
_GROUP: Final = regex.compile(r"\(\?(?:P?<\w+>|[a-zA-Z-]*:|<?[=!]|[>|#])")


def check(source: Mapping[str, Any] | None) -> None:
    """Try each expression of a response template in a child process.

    Raises:
        LoadError: an expression exceeded the limits.
    """
    expressions = sorted(set(_expressions(source, 0)))
    if not expressions or not AVAILABLE:
        return
    confined = Confined("expressions", seconds=SECONDS, memory_bytes=MEMORY, at_once=1)
    try:
        for expression in expressions:
            confined.call(f"{__name__}:search", expression)
    except ConfinedFault as fault:
        raise LoadError(
            f"The response template: {expression[:100]!r} was tried in a process of its own, which {fault}. "
            "Name another response_template in models.yaml."
        ) from None
    except ConfinedError as error:
        raise LoadError(f"The response template's expression {expression[:100]!r}: {error}") from None
    finally:
        confined.close()


def search(expression: str) -> None:
    """Search texts made of an expression's own letters, in each way in which a reply is searched."""
    try:
        pattern = regex.compile(expression, regex.DOTALL)
        tail = regex.compile(rf"(?:{expression})\Z[\s\S]", regex.DOTALL)
    except regex.error:
        return  # the next to compile it says what is wrong
    for text in _texts(expression):
        for _ in pattern.finditer(text):
            pass
        pattern.search(text, partial=True)
        tail.search(text, partial=True)


def _expressions(part: Any, depth: int) -> Iterator[str]:
    if isinstance(part, Mapping) and depth < 8:
        for key, value in part.items():
            if isinstance(value, str) and str(key).endswith("pattern"):
                yield value
            yield from _expressions(value, depth + 1)


def _texts(expression: str) -> Iterator[str]:
    """Texts that begin as the expression does, repeat a part of it, and end with a character that it does not match."""
    runs = [regex.sub(r"\\(.)", r"\1", run) for run in _RUN.findall(_GROUP.sub("(", expression))]
    every = "".join(runs)
    letters = [*dict.fromkeys("a \n" + every + 'A0<{"')][:_LETTERS]
    starts = {joint.join(runs[:count]) for joint in ("", "a") for count in range(min(len(runs), 4))}
    pairs = [one + other for one, other in itertools.permutations(letters[: _LETTERS // 2], 2)]
    for start, part in itertools.product(sorted(starts), _distinct([*letters, *runs, *pairs])):
        yield f"{start}{part * (1 + LENGTH // len(part))}\0{every}"


def _distinct(parts: Sequence[str]) -> list[str]:
    return [part for part in dict.fromkeys(parts) if part]

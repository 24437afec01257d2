"""A response template's expressions, tried on texts of their own letters in a child process that may not end.

A response template may come with a checkpoint and be a stranger's. An expression such as `(?:a|b|ab)*c` takes longer
than anybody waits, on a text of eighty characters. Where a system has no such processes (Windows), none is tried, and
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
"""Of processor time. Published expressions take 0.05 s."""
MEMORY: Final = 1 << 30
LENGTH: Final = 120
"""Of what is repeated: an expression whose time grows with its cube passes, one that doubles with each does not."""
_LETTERS: Final = 16
_RUN: Final = regex.compile(r"(?:\\[^\w]|[^\\()\[\]{}.*+?^$|])+")
_GROUP: Final = regex.compile(r"\(\?(?:P?<\w+>|[a-zA-Z-]*:|<?[=!]|[>|#])")


def check(source: Mapping[str, Any] | None) -> None:
    """Search with each expression of a response template, in a child.

    Raises:
        LoadError: one went beyond the limits.
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
    """Search texts of an expression's own letters in all ways in which a reply is searched."""
    try:
        pattern = regex.compile(expression, regex.DOTALL)
        tail = regex.compile(rf"(?:{expression})\Z[\s\S]", regex.DOTALL)
    except regex.error:
        return  # whoever compiles it next says what is wrong
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
    """What an expression begins with, then much of the same, then what it does not take, then all its letters."""
    runs = [regex.sub(r"\\(.)", r"\1", run) for run in _RUN.findall(_GROUP.sub("(", expression))]
    every = "".join(runs)
    letters = [*dict.fromkeys("a \n" + every + 'A0<{"')][:_LETTERS]
    starts = {joint.join(runs[:count]) for joint in ("", "a") for count in range(min(len(runs), 4))}
    pairs = [one + other for one, other in itertools.permutations(letters[: _LETTERS // 2], 2)]
    for start, part in itertools.product(sorted(starts), _distinct([*letters, *runs, *pairs])):
        yield f"{start}{part * (1 + LENGTH // len(part))}\0{every}"


def _distinct(parts: Sequence[str]) -> list[str]:
    return [part for part in dict.fromkeys(parts) if part]

"""Parse untrusted JSON within bounds. Knows no field.

Each bound is checked before the work that it bounds: the number of values before parsing, depth before any recursion.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["check_count", "parse"]

MOST_VALUES: Final = 6_000_000
"""Values in a text; one costs up to 100 bytes of memory, however short. The largest tokenizer.json has 2 million."""
MOST_LEVELS: Final = 64
"""Levels of nested lists and objects. Libraries go through them by recursion."""


def parse(text: bytes, most_levels: int = MOST_LEVELS) -> Any:
    """Parse JSON within the bounds; refuse keys that occur twice in an object, NaN, and numbers of too many digits.

    Raises:
        ValueError: the text breaks one of these rules, or is not JSON; the message says which.
    """
    check_count(text)
    try:
        data = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_int=_whole)
    except RecursionError:
        raise _too_deep(most_levels) from None
    level = [data]
    for _ in range(most_levels + 1):  # level by level, without recursion
        level = [part for value in level for part in _parts(value)]
    if level:
        raise _too_deep(most_levels)
    return data


def check_count(text: bytes) -> None:
    """Refuse a text that may hold too many values (ValueError)."""
    values = sum(text.count(character) for character in (b",", b"[", b"{"))  # those inside texts are counted, too
    if values > MOST_VALUES:
        raise ValueError(f"it holds up to {values} values; more than {MOST_VALUES} are not read")


def _parts(value: Any) -> Iterable[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in parts if isinstance(part, dict | list))


def _too_deep(most_levels: int) -> ValueError:
    return ValueError(f"it is nested deeper than {most_levels} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return found


def _constant(word: str) -> float:
    if word == "NaN":
        raise ValueError("NaN is not a number")
    return float(word)  # configurations of Mamba 2 hold Infinity


def _whole(digits: str) -> int:
    if len(digits) > 40:  # 1e30 stands for "no end" in tokenizers' configurations
        raise ValueError(f"a number of {len(digits)} digits is not read")
    return int(digits)

"""Match names of modules as PEFT does, by patterns that a stranger wrote, within bounds. Knows no tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, TypeVar

import regex  # type: ignore[import-untyped]  # `re` has no limit on time

__all__ = ["BadPattern", "first_match", "is_named", "matches"]

T = TypeVar("T")

_LONGEST: Final = 4096
_MOST_REPEATS: Final = 10_000
"""The product of all counts in a pattern: the library writes out what is counted, one count inside the other."""
_SECONDS: Final = 0.2
_COUNT: Final = regex.compile(r"\{([^}]*)\}?")
_NUMBERS: Final = regex.compile(r"\d*,?\d*")


class BadPattern(ValueError):
    """An expression that is not matched; the message says which and why, in one sentence."""


def is_named(names: Iterable[str], module: str) -> bool:
    """Tell whether one of some names is a module's, or the end of it after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def matches(pattern: str, module: str, key: str) -> bool:
    """Tell whether a regular expression matches a module's whole name. `key`: where it stands, for errors.

    Raises:
        BadPattern: the expression is not valid, beyond our bounds, or takes too long.
    """
    return _search(_compiled(pattern, key).fullmatch, module, key) is not None


def first_match(table: Mapping[str, T], module: str, default: T, key: str) -> T:
    """Return the value of the first expression that matches a module's name or the end of it; else `default`.

    As PEFT reads rank_pattern and alpha_pattern (`peft.utils.other.get_pattern_key`).

    Raises:
        BadPattern: as `matches`.
    """
    for pattern, value in table.items():
        place = f"{key}.{pattern[:100]}"
        if _search(_compiled(rf"(.*\.)?({pattern})$", place).match, module, place) is not None:
            return value
    return default


@lru_cache(maxsize=4096)
def _compiled(pattern: str, key: str) -> Any:
    if len(pattern) > _LONGEST:
        raise BadPattern(f"{key} has {len(pattern)} characters; more than {_LONGEST} are not read.")
    repeats = 1
    for count in _COUNT.findall(pattern):
        if not _NUMBERS.fullmatch(count):
            raise BadPattern(f"{key}: {{{count[:40]}}} is no count of repetitions.")
        repeats *= max([1, *(int(number[:9]) for number in count.split(",") if number)])
    if repeats > _MOST_REPEATS:
        raise BadPattern(f"{key} repeats {repeats} times; more than {_MOST_REPEATS} are not read.")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise BadPattern(f"{key} is no regular expression: {error}.") from None


def _search(match: Callable[..., Any], module: str, key: str) -> Any:
    try:
        return match(module, timeout=_SECONDS)
    except TimeoutError:
        raise BadPattern(f"{key} takes more than {_SECONDS:g} s to match {module}.") from None

"""Read an untrusted JSON file within bounds. Knows JSON; nothing of what the files are for.

Each bound is checked before the work that it bounds: size before reading, the number of values before parsing, depth
before any recursion.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from engine.errors import LoadError

__all__ = ["check_file", "parse", "read_json"]

MOST_BYTES: Final = 1 << 28
"""Bytes in a file. The largest tokenizer.json of a published model has 35 MB."""
MOST_VALUES: Final = 6_000_000
"""Values in a file; one costs up to 100 bytes of memory, however short. The largest tokenizer.json has 2 million."""
MOST_LEVELS: Final = 64
"""Levels of nested lists and objects. Libraries go through them by recursion."""


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file; LoadError if it is missing, broken, beyond the bounds or something else."""
    try:
        data = parse(_read(path))
    except FileNotFoundError:
        raise LoadError(f"{name}: {path.parent} holds no {path.name}: it is not a checkpoint folder.") from None
    except (OSError, ValueError) as error:
        raise LoadError(f"{name}: cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise LoadError(f"{name}: {path} is not a JSON object.")
    return data


def check_file(path: Path, name: str) -> None:
    """Refuse a file that a library is about to parse if it is beyond the bounds; a missing file is fine."""
    try:
        _check_count(_read(path))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise LoadError(f"{name}: cannot read {path}: {error}") from None


def parse(text: bytes) -> Any:
    """Parse JSON within the bounds; refuse keys that occur twice in an object, NaN, and numbers of too many digits.

    Raises:
        ValueError: the text breaks one of these rules, or is not JSON; the message says which.
    """
    _check_count(text)
    try:
        data = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_int=_whole)
    except RecursionError:
        raise _too_deep() from None
    level = [data]
    for _ in range(MOST_LEVELS + 1):  # level by level, without recursion
        level = [part for value in level for part in _parts(value)]
    if level:
        raise _too_deep()
    return data


def _check_count(text: bytes) -> None:
    values = sum(text.count(character) for character in (b",", b"[", b"{"))  # those inside texts are counted, too
    if values > MOST_VALUES:
        raise ValueError(f"it holds up to {values} values; more than {MOST_VALUES} are not read")


def _parts(value: Any) -> Iterable[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in parts if isinstance(part, dict | list))


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {MOST_LEVELS} levels")


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size} bytes; more than {MOST_BYTES} are not read")
    return path.read_bytes()


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

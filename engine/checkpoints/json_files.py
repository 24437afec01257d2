"""Read an untrusted JSON file within bounds. Knows JSON; nothing of what the files are for.

Size is checked before reading; `engine.text.bounded_json` bounds the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from engine.errors import LoadError
from engine.text.bounded_json import check_count, parse

__all__ = ["check_file", "read_json"]

MOST_BYTES: Final = 1 << 28
"""Bytes in a file. The largest tokenizer.json of a published model has 35 MB."""


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
        check_count(_read(path))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise LoadError(f"{name}: cannot read {path}: {error}") from None


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size} bytes; more than {MOST_BYTES} are not read")
    return path.read_bytes()

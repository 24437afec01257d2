"""Parts of a fingerprint: named values, their digest, and how two sets of them differ. Pure; knows no file, no model.

A part is text, a number, true, false or null, never a list or an object. A long value is replaced by its SHA-256, so
that parts can be printed, compared one by one, and stored with a reply.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import rfc8785

__all__ = ["Part", "Parts", "digest_of", "fingerprint_of", "flat", "part_differences"]

Part = str | int | float | bool | None
Parts = Mapping[str, Part]

_DIGITS: Final = 16  # hexadecimal digits in a fingerprint
_LARGEST: Final = 2**53 - 1  # the largest integer that RFC 8785 writes
_SHOWN: Final = 80  # characters of a value in a sentence
_DIGEST: Final = "sha256:"


def fingerprint_of(parts: Parts, prefix: str) -> str:
    """Return `prefix` and 16 hexadecimal digits of the SHA-256 over the parts in canonical JSON (RFC 8785)."""
    return prefix + hashlib.sha256(rfc8785.dumps(dict(parts))).hexdigest()[:_DIGITS]


def digest_of(value: Any) -> str | None:
    """Return `sha256:` and the digest of a text, of bytes, or of other values as sorted JSON; None of None."""
    if value is None:
        return None
    if not isinstance(value, str | bytes):
        value = json.dumps(value, sort_keys=True, default=str)
    content = value.encode(errors="surrogatepass") if isinstance(value, str) else value
    return _DIGEST + hashlib.sha256(content).hexdigest()


def flat(value: Any) -> Part:
    """Return a value as a part: a list as JSON in one text, an integer beyond 53 bits as its digits."""
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _LARGEST else str(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def part_differences(first: Parts, second: Parts) -> list[str]:
    """Say how two sets of parts differ, a sentence for each part, by name; empty if they are equal.

    For example `transformers 5.23.0 → 5.24.0`, or `only in the first: gguf 0.19.0`.
    """
    told = []
    for name in sorted(first.keys() | second.keys()):
        if name not in second:
            told.append(f"only in the first: {name} {_shown(first[name])}")
        elif name not in first:
            told.append(f"only in the second: {name} {_shown(second[name])}")
        elif not _same(first[name], second[name]):
            told.append(f"{name} {_shown(first[name])} → {_shown(second[name])}")
    return told


def _same(one: Part, other: Part) -> bool:
    """Compare as JSON does: true is not 1, and 1.0 is 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _shown(value: Part) -> str:
    if isinstance(value, str) and value.startswith(_DIGEST):
        return value[: len(_DIGEST) + 12] + "…"
    text = value if isinstance(value, str) and value.strip() else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"

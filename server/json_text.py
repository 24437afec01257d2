"""JSON, both ways. Counts the values of a text from outside before any of them is made; writes one line.

Knows no field of the API. Whatever it refuses, it refuses once, with the limit. Why this is the standard
library's parser, and what others would have done: docs/decisions/0019.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from engine import InvalidFormat, InvalidParameter

__all__ = [
    "MAX_DEPTH",
    "MAX_NAMES",
    "MAX_VALUES",
    "excess_of",
    "kind_of",
    "load_body",
    "load_text",
    "one_line",
    "shown",
    "to_json",
]

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_BREAKS: Final = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))
"""Line ends to many a client's line splitter, though not to the event stream standard; JSON can spell them out."""

MAX_DEPTH: Final = 100
"""Levels of objects and lists in a body: far above any use, far below what Python's own recursion bears."""

MAX_VALUES: Final = 200_000
"""Values in a body, at any depth. 10,000 messages have 30,000. Making this many takes some 30 ms, during which Python
does nothing else."""

MAX_NAMES: Final = 100_000
"""Names of fields in a body, in all objects together: ten for each of 10,000 messages."""

_SHOWN: Final = 100  # characters of a value that come back in a message


def load_body(raw: bytes) -> dict[str, Any]:
    """The object that a body spells.

    Raises:
        InvalidFormat: not UTF-8, not JSON, not an object, nested too deeply, a field twice in an object.
        InvalidParameter: too many values.
    """
    if excess := _excess(raw):
        raise InvalidParameter(f"The body holds more than {excess}; at most that many are allowed.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFormat(f"The body is not UTF-8: byte {error.start} is {raw[error.start]:#04x}.") from None
    try:
        data = json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_no_constant, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        raise InvalidFormat(f"The body is not JSON: {error}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python's own limit on the digits of an integer; its message is about Python
        raise InvalidFormat("The body holds an integer of thousands of digits.") from None
    if not isinstance(data, dict):
        raise InvalidFormat(f"The body must be a JSON object, not {kind_of(data)}.")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _is_deep(data):
        raise _too_deep()
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        _check_surrogates(data)
    return data


def load_text(text: str) -> Any:
    """What JSON inside a string of a body spells.

    Raises:
        ValueError: it is not JSON, or too much of it.
    """
    if excess := _excess(text.encode()):
        raise ValueError(f"more than {excess}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deep(value):
        raise ValueError("nested too deeply")
    return value


def excess_of(texts: Iterable[str]) -> str:
    """What several texts of a body together hold more of than one may; empty if nothing, whatever each holds.

    Right up to the first text that is not JSON.
    """
    return _excess(",".join(texts).encode())


def _excess(raw: bytes) -> str:
    """What there are more of than is allowed, found out without making any; empty if nothing.

    A value is an object, a list, or stands behind a comma; a name stands before a colon. Most texts have far fewer such
    characters altogether. Else those inside strings are taken out, in a few passes over the bytes.
    """
    found = _over(raw)
    if not found:
        return ""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a string
    if bare.count(b'"') > 4 * MAX_VALUES:  # a name and a value, two quotes each
        return found
    return _over(b"".join(bare.split(b'"')[::2]))


def _over(raw: bytes) -> str:
    if raw.count(b",") + raw.count(b"{") + raw.count(b"[") > MAX_VALUES:
        return f"{MAX_VALUES} values"
    return f"{MAX_NAMES} names of fields" if raw.count(b":") > MAX_NAMES else ""


def _integer(digits: str) -> int:
    """An integer. Python's own takes 0.1 ms for one of 4,000 digits; between two calls of this, other threads run."""
    return int(digits)


def _float(digits: str) -> float:
    """A number with a point, for the same reason."""
    return float(digits)


def _no_constant(name: str) -> None:
    raise InvalidFormat(f"The body is not JSON: {name} is not a JSON number.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no name stands twice: one of the two values would be ignored."""
    data = dict(pairs)
    if len(data) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidFormat(f"The body holds the field {twice[:_SHOWN]!r} twice in one object.", code="duplicate_field")
    return data


def _is_deep(value: Any) -> bool:
    """Whether objects and lists have more levels than are allowed. Without recursion: at any depth, on any thread."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _too_deep() -> InvalidFormat:
    return InvalidFormat(f"The body is nested too deeply; {MAX_DEPTH} levels are allowed.")


def _check_surrogates(data: dict[str, Any]) -> None:
    """JSON can spell half of a surrogate pair; no text can hold it."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidFormat(f"The body holds half a surrogate pair: {error.object[error.start]!a}.") from None


def kind_of(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def shown(value: Any) -> str:
    """The beginning of a value, as a message quotes it; nothing for null, lists and objects."""
    if value is None or isinstance(value, dict | list):
        return ""
    return f", {json.dumps(value[:_SHOWN] if isinstance(value, str) else value)[:_SHOWN]}"


def to_json(data: Any) -> str:
    """Compact JSON on one line, whatever the reader takes for the end of a line."""
    return one_line(_ENCODER.encode(data))


def one_line(text: str) -> str:
    """JSON text without any character that some reader takes for the end of a line."""
    if not text.isascii():
        for character, escape in _BREAKS:  # stands only inside strings, so a plain replacement is right
            text = text.replace(character, escape)
    return text

"""Reads and writes JSON. Counts the values of a text from outside before it parses them; writes single lines.

Knows no field of the API. Each refusal names its limit. docs/decisions/0019 says why this is the standard library's
parser, and what others would have done.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from engine import InvalidFormat, InvalidParameter

__all__ = [
    "MAX_DEPTH",
    "MAX_NAMES",
    "MAX_VALUES",
    "escape_line_breaks",
    "excess_in",
    "excess_of",
    "kind_of",
    "load_body",
    "load_text",
    "shown",
    "to_json",
]

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_BREAKS: Final = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))
"""Characters that some clients split lines at, though the event stream standard does not; JSON can escape them."""

MAX_DEPTH: Final = 100
"""Levels of objects and lists in a body: far more than any client needs, far fewer than Python's recursion allows."""

MAX_VALUES: Final = 200_000
"""Values in a body, at any depth. 10,000 messages have 30,000. Parsing this many takes about 30 ms, during which no
other thread of Python runs."""

MAX_NAMES: Final = 100_000
"""Names of fields in a body, in all objects together: ten for each of 10,000 messages."""

_SHOWN: Final = 100  # characters of a value that an error quotes


class _FaultError(ValueError):
    """A text is not JSON that is read here. The message continues a sentence about it: `is …`, `holds …`."""

    def __init__(self, message: str, code: str = InvalidFormat.code) -> None:
        super().__init__(message)
        self.code = code


def load_body(raw: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object. Numbers beyond the range of a double become the nearest double.

    Raises:
        InvalidFormat: not UTF-8, not JSON, not an object, nested too deeply, a field twice in an object.
        InvalidParameter: too many values.
    """
    if excess := excess_in(raw):
        raise InvalidParameter(f"The body holds more than {excess}; at most that many are allowed.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFormat(f"The body is not UTF-8: byte {error.start} is {raw[error.start]:#04x}.") from None
    try:
        data = _parsed(text)
    except json.JSONDecodeError as error:
        raise InvalidFormat(f"The body is not JSON: {error}.") from None
    except _FaultError as fault:
        raise InvalidFormat(f"The body {fault}.", code=fault.code) from None
    if not isinstance(data, dict):
        raise InvalidFormat(f"The body must be a JSON object, not {kind_of(data)}.")
    return data


def load_text(text: str) -> Any:
    """Parse JSON that a string holds, by the rules of a body.

    Raises:
        ValueError: it is not JSON, breaks one of those rules, or is too much.
    """
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a surrogate pair: {text[error.start]!a}") from None
    if excess := excess_in(raw):
        raise ValueError(f"it holds more than {excess}")
    try:
        return _parsed(text)
    except _FaultError as fault:
        raise ValueError(f"it {fault}") from None


def _parsed(text: str) -> Any:
    """Parse JSON whose values have been counted.

    Raises:
        JSONDecodeError: it is not JSON.
        _FaultError: it breaks another rule.
    """
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_no_constant, object_pairs_hook=_object
        )
    except RecursionError:
        raise _too_deep() from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deep(value):
        raise _too_deep()
    if re.search(r"\\u[dD][89a-fA-F]", text):
        _check_surrogates(value)
    return value


def excess_of(texts: Iterable[str]) -> str:
    """Say which limit several texts of a body exceed together; empty if none. Of each as much counts as is JSON."""
    raw = [text.encode() for text in texts]
    joined = b",".join(raw)
    return _over(joined) and _over(b",".join(map(_bare, raw)))


def excess_in(raw: bytes) -> str:
    """Say which limit a text exceeds, without parsing it; empty if none.

    A value is an object, a list, or follows a comma; a name precedes a colon. Most texts have far fewer such characters
    altogether. Otherwise the ones inside strings are removed, in a few passes over the bytes.
    """
    return _over(raw) and _over(_bare(raw))


def _bare(raw: bytes) -> bytes:
    """Remove what stands inside strings; nothing where the strings alone are too many."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a string
    if bare.count(b'"') > 4 * MAX_VALUES:  # a name and a value, two quotes each
        return raw
    return b"".join(bare.split(b'"')[::2])


def _over(raw: bytes) -> str:
    if raw.count(b",") + raw.count(b"{") + raw.count(b"[") > MAX_VALUES:
        return f"{MAX_VALUES} values"
    return f"{MAX_NAMES} names of fields" if raw.count(b":") > MAX_NAMES else ""


def _integer(digits: str) -> int:
    """Parse an integer. One of 4,000 digits takes 0.1 ms; between two calls of this function other threads can run."""
    try:
        return int(digits)
    except ValueError:  # Python limits the digits, and its message speaks of Python
        raise _FaultError("holds an integer of thousands of digits") from None


def _float(digits: str) -> float:
    """Parse a number with a point, as the nearest finite double: infinity cannot be written in JSON again.

    A function of our own for the same reason as `_integer`.
    """
    return min(max(float(digits), -sys.float_info.max), sys.float_info.max)


def _no_constant(name: str) -> None:
    raise _FaultError(f"is not JSON: {name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. A name that occurs twice is refused: one of its values would be ignored."""
    data = dict(pairs)
    if len(data) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _FaultError(f"holds the field {twice[:_SHOWN]!r} twice in one object", code="duplicate_field")
    return data


def _is_deep(value: Any) -> bool:
    """Return whether a value is nested too deeply. Works without recursion, so at any depth and on any thread."""
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


def _too_deep() -> _FaultError:
    return _FaultError(f"is nested too deeply; {MAX_DEPTH} levels are allowed")


def _check_surrogates(value: Any) -> None:
    """Refuse half of a surrogate pair: JSON can spell it, but no text can hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _FaultError(f"holds half a surrogate pair: {error.object[error.start]!a}") from None


def kind_of(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def shown(value: Any) -> str:
    """Return the beginning of a value for an error to quote; nothing for null, lists and objects."""
    if value is None or isinstance(value, dict | list):
        return ""
    return f", {json.dumps(value[:_SHOWN] if isinstance(value, str) else value)[:_SHOWN]}"


def to_json(data: Any) -> str:
    """Write compact JSON on one line, whichever characters the reader splits lines at."""
    return escape_line_breaks(_ENCODER.encode(data))


def escape_line_breaks(text: str) -> str:
    """Escape the characters of a JSON text that some readers split lines at."""
    if not text.isascii():
        for character, escape in _BREAKS:  # they occur only inside strings, so replacing them is correct
            text = text.replace(character, escape)
    return text

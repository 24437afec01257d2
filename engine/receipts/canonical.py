"""The canonical form of JSON data (RFC 8785), its digest, and strict reading of what a receipt holds.

Canonical JSON sorts names and has one kind of number, a double. So two things are written as text: integers beyond
2^53 - 1 as their decimal digits, and data whose order or kind of number matters (a schema, the parameters of a tool, a
template's variables) as the JSON text that it was.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from typing import Any, Final

import rfc8785

from engine.errors import ReceiptError
from engine.text import bounded_json

__all__ = [
    "Reader",
    "canonical",
    "digest_of_ids",
    "json_of",
    "normal",
    "number_of",
    "parse",
    "sha256",
    "text_of_json",
    "written_integer",
]

LARGEST: Final = 2**53 - 1
"""The largest integer that canonical JSON holds."""

_LEVELS_INSIDE: Final = 128
"""Levels of JSON that is kept as text: more than the API allows a body."""

_HEX64: Final = re.compile(r"[0-9a-f]{64}")
_INTEGER: Final = re.compile(r"-?[1-9][0-9]{15,4000}")
_SHOWN: Final = 60  # characters of a value or a name that an error quotes


def sha256(data: bytes) -> str:
    """Return the SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of_ids(ids: Sequence[int]) -> str:
    """Return the SHA-256 over token ids, each as a uint32, little endian."""
    return sha256(struct.pack(f"<{len(ids)}I", *ids))


def canonical(data: Any) -> bytes:
    """Return the canonical form of JSON data.

    Raises:
        ReceiptError: it holds a number or a text that canonical JSON cannot write, or something that is not JSON.
    """
    try:
        return rfc8785.dumps(data)
    except UnicodeEncodeError:
        raise ReceiptError("the receipt holds a name that is not valid Unicode.") from None
    except ValueError as error:
        raise ReceiptError(f"the receipt cannot be written as canonical JSON: {str(error)[:100]}.") from None
    except RecursionError:
        raise ReceiptError("the receipt is nested too deeply.") from None


def parse(data: bytes, what: str = "the receipt") -> Any:
    """Parse JSON.

    Raises:
        ReceiptError: it is not JSON, or not within the bounds.
    """
    try:
        return bounded_json.parse(data)
    except UnicodeDecodeError as error:
        raise ReceiptError(f"{what} is not UTF-8: byte {error.start} is {data[error.start]:#04x}.") from None
    except json.JSONDecodeError as error:
        raise ReceiptError(f"{what} is not JSON: {error}.") from None
    except ValueError as error:
        raise ReceiptError(f"{what} cannot be read: {error}.") from None


def normal(value: Any) -> Any:
    """Return JSON data as its canonical form says it: there, 1.0 is 1.

    Raises:
        ReceiptError: it holds what canonical JSON cannot.
    """
    return json.loads(canonical(value))


def written_integer(value: int) -> int | str:
    """Return an integer as a receipt holds it: beyond 2^53 - 1 as its digits."""
    if abs(value) <= LARGEST:
        return value
    try:
        return str(value)
    except ValueError:
        raise ReceiptError("the request holds an integer of thousands of digits.") from None


def number_of(value: Any) -> Any:
    """Return the integer that `written_integer` wrote as digits; anything else as it is."""
    if isinstance(value, str) and _INTEGER.fullmatch(value) and abs(number := int(value)) > LARGEST:
        return number
    return value


def text_of_json(value: Any, what: str) -> str:
    """Return JSON data as a text that keeps the order of names and the kind of numbers.

    Raises:
        ReceiptError: a part of it is not JSON.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
        same: bool = json.loads(text) == value  # a tuple would come back as a list, a number as a name as a text
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise ReceiptError(f"{what} holds something that JSON cannot write.")
    return text


def json_of(text: str, where: str) -> Any:
    """Return the JSON data of a text inside a receipt."""
    try:
        return bounded_json.parse(text.encode(), _LEVELS_INSIDE)
    except ValueError as error:
        raise ReceiptError(f"{where} is not the text of JSON: {str(error)[:100]}.") from None


class Reader:
    """Reads one object of a receipt strictly: every name is known, none is missing, every value has its type."""

    def __init__(self, value: Any, where: str, names: Sequence[str], optional: Sequence[str] = ()) -> None:
        """`where`: what the object is called in errors; it is empty for the receipt itself.

        Raises:
            ReceiptError: it is no object, or has other names.
        """
        if not isinstance(value, dict):
            raise ReceiptError(f"{where or 'the receipt'} must be an object.")
        self.where = where
        self._values: dict[str, Any] = value
        for name in value:
            if name not in names and name not in optional:
                shown = name[:_SHOWN] if name.isidentifier() else repr(name[:_SHOWN])
                raise ReceiptError(f"{self._path(shown)} is not known in a receipt of this version.")
        for name in names:
            if name not in value:
                raise ReceiptError(f"{self._path(name)} is missing.")

    def has(self, name: str) -> bool:
        return name in self._values

    def any(self, name: str) -> Any:
        return self._values[name]

    def text(self, name: str) -> str:
        value: str = self._typed(name, str, "a text")
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self._values[name] is None else self.text(name)

    def flag(self, name: str) -> bool:
        value: bool = self._typed(name, bool, "true or false")
        return value

    def integer(self, name: str, least: int = 0) -> int:
        value = self._values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(name, f"an integer of at least {least}")
        return value

    def sha256(self, name: str) -> str:
        value = self._values[name]
        if not isinstance(value, str) or not _HEX64.fullmatch(value):
            raise self._wrong(name, "a SHA-256 in 64 hexadecimal digits")
        return value

    def one_of(self, name: str, *words: str) -> str:
        value = self._values[name]
        if not isinstance(value, str) or value not in words:
            raise self._wrong(name, " or ".join(words))
        return value

    def list(self, name: str) -> list[Any]:
        value: list[Any] = self._typed(name, list, "a list")
        return value

    def object(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = self._typed(name, dict, "an object")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Return token ids: integers of 32 bits."""
        values = self.list(name)
        for value in values:
            if type(value) is not int or not 0 <= value < 1 << 32:
                raise self._wrong(name, "a list of token ids")
        return tuple(values)

    def _typed(self, name: str, kind: type, words: str) -> Any:
        value = self._values[name]
        if not isinstance(value, kind):
            raise self._wrong(name, words)
        return value

    def _wrong(self, name: str, words: str) -> ReceiptError:
        return ReceiptError(f"{self._path(name)} must be {words}.")

    def _path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

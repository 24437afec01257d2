"""The kinds of value that a sampling field can have: the JSON type, the range, and the check that both imply.

`SamplingParams` declares its fields with `sampling_field`. Its own checks, the server's checks of types and the OpenAPI
document all read what is declared there. Knows no field by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from engine.errors import InvalidFormat, InvalidParameter

INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1

_METADATA: Final = "sampling"
"""The key of a dataclass field's metadata under which its `SamplingField` lies."""


class Kind(Protocol):
    """The type and range of a field's values."""

    @property
    def json_types(self) -> tuple[type, ...]:
        """Return the Python types of the field's JSON values."""

    @property
    def words(self) -> str:
        """Return the type in words: "NAME must be WORDS"."""

    def checked(self, name: str, value: Any) -> Any:
        """Check a value and return it in the form that the engine uses.

        Raises:
            InvalidFormat: the type is wrong.
            InvalidParameter: the value is outside its range.
        """

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the field's values."""


@dataclass(frozen=True, slots=True)
class SamplingField:
    """One field of `SamplingParams`, as its declaration describes it.

    Attributes:
        default: the value of a field that was not given. Where it is None, None is also a value that can be given.
        extension: whether the OpenAI API lacks this field.
        off: a number below the range that asks for the default, as other servers write it; None: there is none.
    """

    kind: Kind
    default: Any
    description: str
    extension: bool
    off: int | None = None

    def checked(self, name: str, value: Any) -> Any:
        """Check a value; see `Kind.checked`."""
        if self.off is not None and whole_number(value) == self.off:
            return self.default
        return None if value is None and self.default is None else self.kind.checked(name, value)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the field, with its default and its description."""
        default = {"default": _plain(self.default)} if isinstance(self.default, int | float | str) else {}
        least = {} if self.off is None else {"minimum": self.off}
        prefix = "Extension. " if self.extension else ""
        return {**self.kind.schema(), **least, **default, "description": prefix + self.description}


def sampling_field(
    default: Any, kind: Kind, description: str, *, extension: bool = False, off: int | None = None
) -> Any:
    """Declare a field of `SamplingParams`."""
    declared = SamplingField(kind, default, description, extension, off)
    return dataclasses.field(default=default, metadata={_METADATA: declared})


def sampling_fields(cls: type[Any]) -> dict[str, SamplingField]:
    """Return the fields that a dataclass declares with `sampling_field`, by name."""
    return {field.name: field.metadata[_METADATA] for field in dataclasses.fields(cls)}


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer of at least `low` and, where there is a `high`, at most `high`."""

    low: int
    high: int | None = None
    json_types: ClassVar = (int,)
    words: ClassVar = "an integer"

    def checked(self, name: str, value: Any) -> int:
        number = whole_number(value)
        if number is None:
            raise InvalidFormat(f"{name} must be {self.words}, not {value!r}.", param=name)
        if number < self.low or (self.high is not None and number > self.high):
            limit = f"at least {self.low}" if self.high is None else f"between {self.low} and {self.high}"
            raise InvalidParameter(f"{name} must be {limit}, not {number}.", param=name)
        return number

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, **({} if self.high is None else {"maximum": self.high})}


@dataclass(frozen=True, slots=True)
class Number:
    """A number from `low` to `high`, both included."""

    low: float
    high: float
    json_types: ClassVar = (int, float)
    words: ClassVar = "a number"

    def checked(self, name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidFormat(f"{name} must be {self.words}, not {value!r}.", param=name)
        if not self.low <= value <= self.high:  # False for NaN too
            raise InvalidParameter(f"{name} must be between {self.low:g} and {self.high:g}, not {value!r}.", param=name)
        return float(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": _plain(self.low), "maximum": _plain(self.high)}


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    json_types: ClassVar = (bool,)
    words: ClassVar = "true or false"

    def checked(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InvalidFormat(f"{name} must be {self.words}, not {value!r}.", param=name)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few words."""

    values: tuple[str, ...]
    json_types: ClassVar = (str,)
    words: ClassVar = "a string"

    def checked(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.values:
            allowed = " or ".join(repr(one) for one in self.values)
            raise InvalidParameter(f"{name} must be {allowed}, not {value!r}.", param=name)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True, slots=True)
class Strings:
    """A string or a list of strings. Checked: a tuple without duplicates.

    Attributes:
        most: strings in the list.
        longest: characters of a string.
    """

    most: int
    longest: int
    json_types: ClassVar = (str, list)
    words: ClassVar = "a string or a list of strings"

    def checked(self, name: str, value: Any) -> tuple[str, ...]:
        given = (value,) if isinstance(value, str) else value
        if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
            raise InvalidFormat(f"{name} must be {self.words}, not {value!r}.", param=name)
        if len(given) > self.most:
            raise InvalidParameter(f"{name} takes at most {self.most} strings, not {len(given)}.", param=name)
        for one in given:
            if not one:
                raise InvalidParameter(f"{name} must not contain an empty string: it would match at once.", param=name)
            if len(one) > self.longest:
                raise InvalidParameter(
                    f"a {name} string may have at most {self.longest} characters, not {len(one)}.", param=name
                )
        return tuple(dict.fromkeys(given))

    def schema(self) -> dict[str, Any]:
        each = {"type": "string", "minLength": 1, "maxLength": self.longest}
        one = {"type": "string", "minLength": 1}
        return {"anyOf": [one, {"type": "array", "maxItems": self.most, "items": each}, {"type": "null"}]}


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of at most `most` token ids. Checked: a tuple, ascending, without duplicates."""

    most: int
    json_types: ClassVar = (list,)
    words: ClassVar = "a list of integers"

    def checked(self, name: str, value: Any) -> tuple[int, ...]:
        ids = [whole_number(i) for i in value] if isinstance(value, Sequence) else [None]
        if None in ids:
            raise InvalidFormat(f"{name} must be {self.words}, not {value!r}.", param=name)
        if len(ids) > self.most:
            raise InvalidParameter(f"{name} takes at most {self.most} ids, not {len(ids)}.", param=name)
        return tuple(sorted({i for i in ids if i is not None}))

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "maxItems": self.most, "items": {"type": "integer"}}


@dataclass(frozen=True, slots=True)
class TokenBiases:
    """A mapping of token ids to numbers from `low` to `high`. Checked: a tuple of pairs, ids ascending.

    A key may be a string of digits, as JSON has it. Pairs, the checked form, are accepted as well.
    """

    low: float
    high: float
    json_types: ClassVar = (dict,)
    words: ClassVar = "an object"

    def checked(self, name: str, value: Any) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, Mapping | tuple):
            raise InvalidFormat(f"{name} must map token ids to numbers, not {value!r}.", param=name)
        biases: dict[int, float] = {}
        for key, bias in value.items() if isinstance(value, Mapping) else value:
            at = f"{name}.{key}"
            try:
                token = key if isinstance(key, int) and not isinstance(key, bool) else _digits(key)
            except ValueError:
                raise InvalidParameter(f"{name}: {key!r} is not a token id.", param=at) from None
            what = f"{name}: the bias of token {token} must be"
            if not isinstance(bias, int | float) or isinstance(bias, bool):
                raise InvalidFormat(f"{what} a number, not {bias!r}.", param=at)
            if not self.low <= bias <= self.high:
                raise InvalidParameter(f"{what} between {self.low:g} and {self.high:g}, not {bias!r}.", param=at)
            biases[token] = float(bias)
        return tuple(sorted(biases.items()))

    def schema(self) -> dict[str, Any]:
        each = {"type": "number", "minimum": _plain(self.low), "maximum": _plain(self.high)}
        return {"type": "object", "additionalProperties": each}


def whole_number(value: Any) -> int | None:
    """Return an integer, also one written with a point (7.0), as JSON of some languages has it; None for all else.

    A float beyond 2^53 may stand for several integers, so it is none.
    """
    if type(value) is float and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _digits(key: object) -> int:
    # int() alone would also take " 7", "07", "1_0" and Arabic digits: two spellings of one id in one object.
    if not isinstance(key, str) or not key.isascii() or not key.isdigit() or len(key) > 18 or key != str(int(key)):
        raise ValueError(key)
    return int(key)


def _plain(value: Any) -> Any:
    """Return a number as JSON shows it best: 1 for 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

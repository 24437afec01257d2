"""Typed access to the values of a request body, and the parsed request that every endpoint makes of one.

Knows no field of the API by name. Every error names the field by its dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from engine import GenerationRequest, InvalidFormat, InvalidParameter
from server.json_text import kind_of, shown

Kind = tuple[tuple[type, ...], str]
"""The types that a value may be read as, and their name in an error: "must be a string"."""
FLAG: Final[Kind] = ((bool,), "true or false")
INTEGER: Final[Kind] = ((int,), "an integer")
STRING: Final[Kind] = ((str,), "a string")
LIST: Final[Kind] = ((list,), "a list")
OBJECT: Final[Kind] = ((dict,), "an object")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A checked body, whichever endpoint it was sent to.

    Attributes:
        generations: the engine's requests that the reply is made of, one per prompt. The first has the reply's id.
        ignored: dotted names of unknown fields.
        receipt: whether the reply comes with its receipt; `digest`: with one without text.
        prompt_logprobs: of a completion of plain text, which computes them for `echo` too: alternatives beside each
            token where the reply tells them by themselves; None where it does not.
        repeated: what the endpoint's writers need of the body, by names of the endpoint's own.
    """

    model: str
    generations: tuple[GenerationRequest, ...]
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]
    prompt_logprobs: int | None = None
    receipt: bool | Literal["digest"] = False
    repeated: Mapping[str, Any] = field(default_factory=dict)


def typed(value: Any, name: str, kind: Kind) -> Any:
    """Return a value of the right type, or raise `InvalidFormat`."""
    types, words = kind
    if type(value) not in types:  # exactly: True is an int to isinstance
        raise InvalidFormat(f"{name} must be {words}, not {kind_of(value)}{shown(value)}.", param=name)
    return value


def required(data: Mapping[str, Any], name: str, kind: Kind, at: str = "") -> Any:
    """Return the value of a field that must be present.

    Args:
        at: the path of the object that holds the field, with a dot at its end: `messages.0.`.
    """
    if name not in data:
        raise InvalidFormat(f"{at}{name} is required.", param=f"{at}{name}", code="missing_field")
    return typed(data[name], f"{at}{name}", kind)


def optional(data: Mapping[str, Any], name: str, kind: Kind, at: str = "") -> Any:
    """Return the value of a field, or None if it is absent or null. `at`: as in `required`."""
    value = data.get(name)
    return None if value is None else typed(value, f"{at}{name}", kind)


def at_most(limit: int, count: int, name: str, things: str) -> None:
    """Refuse a field that holds more things than allowed."""
    if count > limit:
        raise InvalidParameter(f"{name} may hold at most {limit} {things}, not {count}.", param=name)

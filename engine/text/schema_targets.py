"""`write_references`: writes the references of a schema that was read, once it is known where what they name has gone.

Reading moves parts of a schema (a list of `items` becomes `prefixItems`; what `nullable` stands beside becomes an
alternative) and drops some. So a reference is a `Target` while a schema is read. Afterwards it is a pointer to what the
part that it names has become, wherever that is; if it is nowhere, the part is read once more, under `$defs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from engine.text.json_schema import encoded, pointed
from engine.text.schema_keywords import LISTS, MAPS, SCHEMAS
from engine.text.schema_references import Place, found_at

__all__ = ["Target", "pointer_of", "write_references"]

_LONG: Final = 256
"""Letters of a pointer that is written for a shorter reference; to what is further away, a name is given."""


@dataclass(frozen=True, slots=True)
class Target:
    """The value of a `$ref` while its schema is read."""

    place: Place | None
    """In the request's schema; None if nothing is there."""
    written: str = ""
    """The reference in the request."""


def pointer_of(place: Place) -> str:
    """Write a place as a JSON pointer (RFC 6901)."""
    return "".join(f"/{pointed(step)}" for step in place)


def write_references(whole: Any, root: Any, became: Mapping[Place, Any], read: Callable[[Any, Place], Any]) -> None:
    """Write each `Target` in a schema that was read as a pointer; change the schema in place.

    Args:
        root: the request's schema.
        became: what the schema at each of its places was read as; `read` adds to it.
        read: reads the schema at a place of `root`.
    """
    placed: dict[int, Place] = {}  # by identity
    names: dict[Place, str] = {}  # of copies
    numbers = count()
    waiting = _references_in(whole, (), placed)
    while waiting:
        part = waiting.pop()
        target: Target = part["$ref"]
        if target.place is None:
            part["$ref"] = _nowhere(target.written)
            continue
        named = found_at(root, target.place)
        if isinstance(named, bool):  # which has no identity; another of the same value is as good
            place = target.place if _is_there(whole, target.place, named) else None
        else:
            place = placed.get(id(became.get(target.place)))
        if place is not None and sum(map(len, place)) <= _LONG + len(target.written):
            part["$ref"] = f"#{encoded(pointer_of(place))}"
            continue
        if target.place not in names:
            definitions = whole.setdefault("$defs", {})
            last = target.place[-1][:40]
            name = names[target.place] = next(free for n in numbers if (free := f"at{n}:{last}") not in definitions)
            definitions[name] = read(named, target.place)
            waiting += _references_in(definitions[name], ("$defs", name), placed)
        part["$ref"] = f"#/$defs/{encoded(pointed(names[target.place]))}"


def _references_in(part: Any, place: Place, placed: dict[int, Place]) -> list[dict[str, Any]]:
    """Return the schemas inside one, which is at a place, that refer to others; note the places of all."""
    found = []
    waiting = [(part, place)]
    while waiting:
        part, place = waiting.pop()
        if not isinstance(part, dict) or id(part) in placed:
            continue
        placed[id(part)] = place
        if isinstance(part.get("$ref"), Target):
            found.append(part)
        waiting += [(one, (*place, *steps)) for steps, one in _inside(part)]
    return found


def _inside(part: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    """Yield the schemas directly inside one that was read, with the steps to them."""
    for keyword, value in part.items():
        if keyword in SCHEMAS:
            yield (keyword,), value
        elif keyword in LISTS:
            for i, one in enumerate(value):
                yield (keyword, str(i)), one
        elif keyword in MAPS:
            for name, one in value.items():
                yield (keyword, name), one


def _nowhere(reference: str) -> str:
    """Return a reference to nothing that names nothing in the schema that was read, either."""
    if reference.startswith("#/$gone/") or not (reference == "#" or reference.startswith("#/")):
        return reference
    return f"#/$gone{reference[1:]}"


def _is_there(whole: Any, place: Place, wanted: bool) -> bool:
    try:
        return found_at(whole, place) is wanted
    except (LookupError, ValueError):
        return False

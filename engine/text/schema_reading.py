"""`read_schema`: reads a JSON schema as frameworks write it, and writes it in draft 2020-12 with plain references.

    a request's schema ──read_schema──▶ ReadSchema: draft 2020-12, references by JSON pointer, and what was left out

Older drafts (`exclusiveMinimum: true`, `items: [...]`, `required: true` of a member), OpenAPI's `nullable`, identifiers
and anchors are rewritten with the same meaning. A keyword whose value can only mean that it is absent (`required:
null`, `properties: []`), a bound that no reply reaches, and a keyword that nobody knows are left out, and named. Any
other wrong value is refused. No llguidance: what can be enforced is another question (`engine.grammar.diagnosis`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.errors import InvalidParameter
from engine.text.json_schema import check_depth
from engine.text.schema_keywords import (
    ANNOTATIONS,
    HINTS,
    INTEGER_FORMATS,
    KEYWORDS,
    LISTS,
    MAPS,
    SCHEMAS,
    fault,
    is_count,
    says_nothing,
)
from engine.text.schema_references import LongIdentifierError, Place, References
from engine.text.schema_targets import Target, pointer_of, write_references
from engine.text.schema_unions import tell_apart

__all__ = ["ReadSchema", "read_schema"]

_MOST_COUNT: Final = 2**53  # of anything in a reply
_MOST_NAMED: Final = 64  # of what is left out; more than a header shows
_VACUOUS: Final = 1e300  # a number as large as this is a bound on nothing that a double can hold
_INTEGERS: Final = (-(2**63), 2**63 - 1)  # those that can be bounds in a grammar
_LEAST: Final = -(2**63) + 1024  # the least of them, as a double
_OTHERS: Final = frozenset(
    {
        "allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "$recursiveRef", "if", "dependentSchemas", "dependencies",
        "additionalProperties",
    }
)  # fmt: skip
"""Keywords beside which `unevaluatedProperties` says something else than `additionalProperties`."""
_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")

_PLAIN_PATTERN: Final = re.compile(r"(?:[^\\(]|\((?!\?)|\\[^1-9bBkK])*")
_EMPTY: Final[tuple[Any, ...]] = (True, {}, {"type": "string"})  # what says nothing of a name


@dataclass(frozen=True, slots=True)
class ReadSchema:
    """A schema in draft 2020-12, and JSON pointers (into the original) to what was left out of it."""

    schema: Any
    left_out: tuple[str, ...] = ()


def read_schema(schema: Any, param: str) -> ReadSchema:
    """Read a schema. `param`: the request's field that holds it.

    Raises:
        InvalidParameter: it is nested too deeply, or no schema; a JSON pointer says where.
    """
    check_depth(schema, param)
    counts = _counts_members(schema)
    reader = _Reader(schema, param, counts)
    found = reader.whole()
    if counts and not _counts_members(found):  # only a part did that has been left out
        reader = _Reader(schema, param, counts=False)
        found = reader.whole()
    return ReadSchema(found, reader.named())


class _Reader:
    """Reads one schema. `counts`: whether some part of it counts the members that others describe."""

    def __init__(self, root: Any, param: str, counts: bool) -> None:
        self._root = root
        self._param = param
        self._left_out: dict[Place, None] = {}
        self._read: dict[Place, Any] = {}  # places in the request's schema → what they became
        self._counts_members = counts
        try:
            self._references = References(root)
        except LongIdentifierError as error:
            raise self._refused(*error.args) from None

    def whole(self) -> Any:
        found = self._schema(self._root, ())
        write_references(found, self._root, self._read, self._again)
        tell_apart(found)
        return found

    def named(self) -> tuple[str, ...]:
        """Return pointers to what was left out."""
        return tuple(map(pointer_of, self._left_out))

    def _again(self, part: Any, place: Place) -> Any:
        return self._schema(part, place, place[-2:-1] == ("properties",))

    def _leave_out(self, place: Place) -> None:
        if len(self._left_out) < _MOST_NAMED:
            self._left_out[place] = None

    def _schema(self, part: Any, place: Place, member: bool = False) -> Any:
        """Read the schema at a place. `member`: whether it is one of `properties`; it may say that it is required."""
        if isinstance(part, bool):
            return part
        if not isinstance(part, Mapping):
            raise self._refused(place, f"a schema must be an object, true or false, not {_shown(part)}")
        found: dict[str, Any] = {}
        for keyword, value in part.items():
            here = (*place, keyword)
            if keyword == "discriminator":
                found[keyword] = value  # as long as `tell_apart` has not read it
            elif keyword in ANNOTATIONS or keyword.startswith("x-"):
                continue
            elif keyword not in KEYWORDS:
                self._leave_out(here)
            elif keyword == "dependencies":
                self._dependencies(value, here, found)
            elif keyword == "items" and isinstance(value, list):
                if value:
                    found["prefixItems"] = [self._schema(one, (*here, str(i))) for i, one in enumerate(value)]
                if part.get("additionalItems") is not None:
                    found["items"] = self._schema(part["additionalItems"], (*place, "additionalItems"))
            elif keyword == "additionalItems":
                continue  # it counts beside a list of items only
            elif keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
                continue  # it is read with the bound itself
            elif member and keyword == "required" and value is True:
                continue  # it is read with the members
            elif says_nothing(keyword, value):
                self._leave_out(here)
            elif (wanted := fault(keyword, value)) is not None:
                raise self._refused(here, f"it must be {wanted}, not {_shown(value)}")
            else:
                self._keyword(part, keyword, value, here, found)
        self._read[place] = self._nullable(part, self._rewritten(part, found, place))
        return self._read[place]

    def _keyword(self, part: Mapping[str, Any], keyword: str, value: Any, here: Place, found: dict[str, Any]) -> None:
        """Read a keyword of the right shape."""
        if keyword in SCHEMAS:
            found[keyword] = self._schema(value, here)
        elif keyword in LISTS:
            found[keyword] = [self._schema(one, (*here, str(i))) for i, one in enumerate(value)]
        elif keyword in MAPS:
            kept = {}
            for name, one in value.items():
                if one is None:
                    self._leave_out((*here, name))
                kept[name] = True if one is None else self._schema(one, (*here, name), keyword == "properties")
            found[keyword] = kept
        elif keyword == "$ref":
            found[keyword] = Target(self._references.place(value, here[:-1]), value)
        elif keyword in _REFERENCES:
            target = self._references.dynamic(keyword, value, here[:-1])
            found[keyword] = value if target is None else Target(target, value)
        elif keyword in ("minimum", "maximum"):
            strict = "exclusive" + keyword.capitalize()
            self._bound(part, strict if part.get(strict) is True else keyword, value, here, found)
        elif keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            self._bound(part, keyword, value, here, found)
        elif is_count(value) and keyword != "multipleOf" and keyword.startswith(("min", "max")):
            if keyword.startswith("max") and value > _MOST_COUNT:
                self._leave_out(here)
            else:
                found[keyword] = int(value)
        else:
            found[keyword] = value

    def _bound(self, part: Mapping[str, Any], keyword: str, value: Any, here: Place, found: dict[str, Any]) -> None:
        """Read a bound, and leave it out where it forbids nothing that a double can hold, or is beyond int64.

        llguidance has integers of any size, but only where a bound beyond those of int64 is not said.
        """
        low = keyword.endswith("inimum")
        vacuous = value <= -_VACUOUS if low else value >= _VACUOUS
        most = _INTEGERS[1] + keyword.startswith("exclusive")
        if vacuous or (_is_integer(part) and (value < _INTEGERS[0] if low else value > most)):
            self._leave_out(here)
        elif abs(value) >= _VACUOUS:
            found[keyword] = 1e308 if value > 0 else -1e308  # nothing satisfies it; whole numbers are of any length
        elif low and value < _LEAST and _is_integer(part):
            found[keyword] = _LEAST
        else:
            found[keyword] = value

    def _dependencies(self, value: Any, here: Place, found: dict[str, Any]) -> None:
        """Read `dependencies`, which later drafts split in two."""
        if not isinstance(value, Mapping):
            if value not in (None, []):
                raise self._refused(here, f"it must be an object, not {_shown(value)}")
            self._leave_out(here)
            return
        for name, one in value.items():
            inner = (*here, name)
            if isinstance(one, list):
                if wanted := fault("required", one):
                    raise self._refused(inner, f"it must be {wanted}, not {_shown(one)}")
                found.setdefault("dependentRequired", {})[name] = one
            else:
                found.setdefault("dependentSchemas", {})[name] = self._schema(one, inner)

    # -- what other drafts and dialects say in other words ------------------------------------------------------------

    def _rewritten(self, part: Mapping[str, Any], found: dict[str, Any], place: Place) -> dict[str, Any]:
        members = part["properties"] if isinstance(part.get("properties"), Mapping) else {}
        said = [name for name, one in members.items() if isinstance(one, Mapping) and one.get("required") is True]
        if said:
            found["required"] = [*dict.fromkeys([*found.get("required", ()), *said])]
        _one_reference(found)
        if found.get("uniqueItems") is False:
            del found["uniqueItems"]
        if "format" in found:
            self._format(found, place)
        if "if" not in found or not ({"then", "else"} & found.keys() or self._counts_members):
            for keyword in ("if", "then", "else"):
                found.pop(keyword, None)
        if "contains" not in found:
            found.pop("minContains", None)
            found.pop("maxContains", None)
        for keyword in ("unevaluatedProperties", "unevaluatedItems"):
            if keyword in found and found[keyword] in (True, {}):
                del found[keyword]
        for keyword in ("dependentRequired", "dependentSchemas", "patternProperties"):
            if found.get(keyword) == {}:
                del found[keyword]
        if "unevaluatedProperties" in found and not _OTHERS & found.keys():
            found["additionalProperties"] = found.pop("unevaluatedProperties")
        if "propertyNames" in found:
            self._name_properties(found, place)
        return found

    def _format(self, found: dict[str, Any], place: Place) -> None:
        """Read formats of numbers as bounds, and leave out those that say nothing of a value."""
        kinds = found.get("type", ["string"])
        if found["format"] in HINTS:
            del found["format"]
        elif "string" not in (kinds if isinstance(kinds, list) else [kinds]):
            least, most = INTEGER_FORMATS.get(found.pop("format"), (None, None))
            if least is not None:
                found["minimum"] = max(least, found.get("minimum", least), _LEAST)
            if most is not None and most <= _INTEGERS[1]:
                found["maximum"] = min(most, found.get("maximum", most))
            else:
                self._leave_out((*place, "format"))

    def _nullable(self, part: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Allow null where OpenAPI 3.0 does. https://spec.openapis.org/oas/v3.0.3#schema-object"""
        if part.get("nullable") is not True:
            return found
        if isinstance(found.get("enum"), list) and None not in found["enum"]:
            found["enum"] = [*found["enum"], None]
        if "type" in found:
            kinds = found["type"] if isinstance(found["type"], list) else [found["type"]]
            found["type"] = [*kinds, *(["null"] if "null" not in kinds else [])]
        rest = {
            key: found.pop(key) for key in (*_REFERENCES, "anyOf", "oneOf", "allOf", "const", "not") if key in found
        }
        if rest:
            found["anyOf"] = [rest, {"type": "null"}]
        return found

    def _name_properties(self, found: dict[str, Any], place: Place) -> None:
        """Write `propertyNames` as keywords that list the names or match them, where that says the same."""
        names = found["propertyNames"]
        if names in _EMPTY:
            del found["propertyNames"]
            return
        said = {key: value for key, value in names.items() if key != "type"} if isinstance(names, dict) else {}
        if "patternProperties" in found or not isinstance(names, dict) or names.get("type", "string") != "string":
            return
        if self._counts_members:
            return  # `properties` have a say in what is unevaluated, `propertyNames` have none
        rest = found.get("additionalProperties", True)
        if said.keys() == {"enum"} or said.keys() == {"const"}:
            listed = {name: None for name in said.get("enum", [said.get("const")]) if isinstance(name, str)}
            members = found.get("properties", {})
            if len(listed) > 1 and not _is_small(rest):
                # It would be there for each name. (`unevaluatedProperties` may have become `additionalProperties`.)
                said_by = ("additionalProperties", "unevaluatedProperties")
                rest = {"$ref": Target(next(at for key in said_by if self._read.get(at := (*place, key)) is rest))}
            found["properties"] = {
                **{name: one if name in listed else False for name, one in members.items()},
                **{name: rest for name in listed if name not in members},
            }
            found["additionalProperties"] = False
            del found["propertyNames"]
        elif said.keys() == {"pattern"} and not found.get("properties") and _PLAIN_PATTERN.fullmatch(said["pattern"]):
            found["patternProperties"] = {said["pattern"]: rest}
            found["additionalProperties"] = False
            del found["propertyNames"]

    def _refused(self, place: Place, why: str) -> InvalidParameter:
        pointer = pointer_of(place)
        return InvalidParameter(
            f"{self._param}: at {pointer or 'the root'}: {why}.",
            param=self._param,
            code="schema_not_enforceable",
            pointer=pointer,
        )


def _one_reference(found: dict[str, Any]) -> None:
    """Write all kinds of references as `$ref`: the first as itself, others beside it in `allOf`."""
    targets = [keyword for keyword in _REFERENCES if isinstance(found.get(keyword), Target)]
    for keyword in targets:
        target = found[keyword]
        if keyword != "$ref":
            del found[keyword]
            if "$ref" in found:
                found["allOf"] = [*found.get("allOf", ()), {"$ref": target}]
            else:
                found["$ref"] = target


def _counts_members(root: Any) -> bool:
    """Whether some `unevaluatedProperties` of a document depends on which of its parts describe a member."""
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            if part.get("unevaluatedProperties") not in (None, True, {}) and _OTHERS & part.keys():
                return True
            if part.get("unevaluatedItems") not in (None, True, {}):
                return True
        waiting += part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
    return False


def _is_small(part: Any) -> bool:
    """Whether a schema is short enough to be written many times."""
    said = part.values() if isinstance(part, dict) else ()
    return len(said) <= 4 and all(isinstance(one, int | float | str) and len(str(one)) <= 40 for one in said)


def _is_integer(part: Mapping[str, Any]) -> bool:
    """Whether the numbers that a schema allows are integers."""
    kinds = part.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return "integer" in kinds and "number" not in kinds


def _shown(value: Any) -> str:
    return repr(value)[:100]

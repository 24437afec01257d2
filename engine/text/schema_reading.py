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
from engine.text.json_schema import at, check_depth, encoded, pointed
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
from engine.text.schema_references import References
from engine.text.schema_unions import tell_apart

__all__ = ["ReadSchema", "read_schema"]

_MOST_COUNT: Final = 2**53  # of anything in a reply
_VACUOUS: Final = 1e300  # a number as large as this is a bound on nothing that a double can hold
_LEAST: Final = -(2**63) + 1024  # the least integer, as a double, that can be a bound in a grammar

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
    reader = _Reader(schema, param)
    found = reader.whole()
    return ReadSchema(found, reader.named())


class _Reader:
    """Reads one schema."""

    def __init__(self, root: Any, param: str) -> None:
        self._root = root
        self._param = param
        self._references = References(root)
        self._honoured: set[str] = set()  # of what was left out where it stood
        self._waiting: list[str] = []  # pointers to schemas at unusual places, which references name
        self._names: dict[str, str] = {}  # of those under `$defs`
        self.left_out: list[str] = []

    def whole(self) -> Any:
        found = self._schema(self._root, "")
        while self._waiting:
            pointer = self._waiting.pop()
            part = self._schema(at(self._root, pointer), pointer)
            found.setdefault("$defs", {})[self._names[pointer]] = part
        tell_apart(found)
        return found

    def named(self) -> tuple[str, ...]:
        """Return pointers to what was left out."""
        return tuple(pointer for pointer in self.left_out if pointer not in self._honoured)

    def _schema(self, part: Any, pointer: str) -> Any:
        if isinstance(part, bool):
            return part
        if not isinstance(part, Mapping):
            raise self._refused(pointer, f"a schema must be an object, true or false, not {_shown(part)}")
        found: dict[str, Any] = {}
        for keyword, value in part.items():
            here = f"{pointer}/{pointed(keyword)}"
            if keyword == "discriminator":
                found[keyword] = value  # as long as `tell_apart` has not read it
            elif keyword in ANNOTATIONS or keyword.startswith("x-"):
                continue
            elif keyword not in KEYWORDS:
                self.left_out.append(here)
            elif keyword == "dependencies":
                self._dependencies(value, here, found)
            elif keyword == "items" and isinstance(value, list):
                if value:
                    found["prefixItems"] = [self._schema(one, f"{here}/{i}") for i, one in enumerate(value)]
                if part.get("additionalItems") is not None:
                    found["items"] = self._schema(part["additionalItems"], f"{pointer}/additionalItems")
            elif keyword == "additionalItems":
                continue  # it counts beside a list of items only
            elif keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
                continue  # it is read with the bound itself
            elif says_nothing(keyword, value):
                self.left_out.append(here)
            elif (wanted := fault(keyword, value)) is not None:
                raise self._refused(here, f"it must be {wanted}, not {_shown(value)}")
            else:
                self._keyword(part, keyword, value, here, found)
        return self._nullable(part, self._rewritten(part, found, pointer))

    def _keyword(self, part: Mapping[str, Any], keyword: str, value: Any, here: str, found: dict[str, Any]) -> None:
        """Read a keyword of the right shape."""
        if keyword in SCHEMAS:
            found[keyword] = self._schema(value, here)
        elif keyword in LISTS:
            found[keyword] = [self._schema(one, f"{here}/{i}") for i, one in enumerate(value)]
        elif keyword in MAPS:
            kept = {}
            for name, one in value.items():
                if one is None:
                    self.left_out.append(f"{here}/{pointed(name)}")
                kept[name] = True if one is None else self._schema(one, f"{here}/{pointed(name)}")
            found[keyword] = kept
        elif keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            found["$ref"] = self._reference(value, here.rpartition("/")[0])
        elif keyword in ("minimum", "maximum"):
            strict = "exclusive" + keyword.capitalize()
            self._bound(part, strict if part.get(strict) is True else keyword, value, here, found)
        elif keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            self._bound(part, keyword, value, here, found)
        elif is_count(value) and keyword != "multipleOf" and keyword.startswith(("min", "max")):
            if keyword.startswith("max") and value > _MOST_COUNT:
                self.left_out.append(here)
            else:
                found[keyword] = int(value)
        else:
            found[keyword] = value

    def _bound(self, part: Mapping[str, Any], keyword: str, value: Any, here: str, found: dict[str, Any]) -> None:
        if abs(value) >= _VACUOUS:
            self.left_out.append(here)
        elif keyword.endswith("inimum") and value < _LEAST and part.get("type") == "integer":
            found[keyword] = _LEAST
        else:
            found[keyword] = value

    def _dependencies(self, value: Any, here: str, found: dict[str, Any]) -> None:
        """Read `dependencies`, which later drafts split in two."""
        if not isinstance(value, Mapping):
            if value not in (None, []):
                raise self._refused(here, f"it must be an object, not {_shown(value)}")
            self.left_out.append(here)
            return
        for name, one in value.items():
            inner = f"{here}/{pointed(name)}"
            if isinstance(one, list):
                if wanted := fault("required", one):
                    raise self._refused(inner, f"it must be {wanted}, not {_shown(one)}")
                found.setdefault("dependentRequired", {})[name] = one
            else:
                found.setdefault("dependentSchemas", {})[name] = self._schema(one, inner)

    def _reference(self, value: str, pointer: str) -> str:
        """Write a reference as a JSON pointer, to a schema at a place where schemas are."""
        target = self._references.pointer(value, pointer)
        if target is None or not self._is_there(target):
            return value
        if self._references.is_schema(target):
            return f"#{encoded(self._references.moved(target))}"
        if target not in self._names:
            self._names[target] = f"at{len(self._names)}:{target.rpartition('/')[2]}"
            self._waiting.append(target)
        return f"#/$defs/{encoded(pointed(self._names[target]))}"

    def _is_there(self, pointer: str) -> bool:
        try:
            return isinstance(at(self._root, pointer), Mapping | bool)
        except (LookupError, ValueError):
            return False

    # -- what other drafts and dialects say in other words ------------------------------------------------------------

    def _rewritten(self, part: Mapping[str, Any], found: dict[str, Any], pointer: str) -> dict[str, Any]:
        for name, one in (part["properties"] if isinstance(part.get("properties"), Mapping) else {}).items():
            if isinstance(one, Mapping) and one.get("required") is True and isinstance(one["required"], bool):
                found["required"] = [*dict.fromkeys([*found.get("required", ()), name])]
                self._honoured.add(f"{pointer}/properties/{pointed(name)}/required")
        if found.get("uniqueItems") is False:
            del found["uniqueItems"]
        if "format" in found:
            self._format(found, pointer)
        if not {"then", "else"} & found.keys() or "if" not in found:
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
        others = {"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "additionalProperties"}
        if "unevaluatedProperties" in found and not others & found.keys():
            found["additionalProperties"] = found.pop("unevaluatedProperties")
        if "propertyNames" in found:
            _name_properties(found)
        return found

    def _format(self, found: dict[str, Any], pointer: str) -> None:
        """Read formats of numbers as bounds, and leave out those that say nothing of a value."""
        kinds = found.get("type", ["string"])
        if found["format"] in HINTS:
            del found["format"]
        elif "string" not in (kinds if isinstance(kinds, list) else [kinds]):
            least, most = INTEGER_FORMATS.get(found.pop("format"), (None, None))
            if least is None or most is None:
                self.left_out.append(f"{pointer}/format")
            else:
                found["minimum"] = max(least, found.get("minimum", least), _LEAST)
                found["maximum"] = min(most, found.get("maximum", most))

    def _nullable(self, part: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Allow null where OpenAPI 3.0 does. https://spec.openapis.org/oas/v3.0.3#schema-object"""
        if part.get("nullable") is not True:
            return found
        if isinstance(found.get("enum"), list) and None not in found["enum"]:
            found["enum"] = [*found["enum"], None]
        if "type" in found:
            kinds = found["type"] if isinstance(found["type"], list) else [found["type"]]
            found["type"] = [*kinds, *(["null"] if "null" not in kinds else [])]
        rest = {key: found.pop(key) for key in ("$ref", "anyOf", "oneOf", "allOf", "const", "not") if key in found}
        if rest:
            found["anyOf"] = [rest, {"type": "null"}]
        return found

    def _refused(self, pointer: str, why: str) -> InvalidParameter:
        return InvalidParameter(
            f"{self._param}: at {pointer or 'the root'}: {why}.",
            param=self._param,
            code="schema_not_enforceable",
            pointer=pointer,
        )


def _name_properties(found: dict[str, Any]) -> None:
    """Write `propertyNames` as keywords that list the names or match them, where that says the same."""
    names = found["propertyNames"]
    if names in _EMPTY:
        del found["propertyNames"]
        return
    said = {key: value for key, value in names.items() if key != "type"} if isinstance(names, dict) else {}
    if "patternProperties" in found or not isinstance(names, dict) or names.get("type", "string") != "string":
        return
    rest = found.get("additionalProperties", True)
    if said.keys() == {"enum"} or said.keys() == {"const"}:
        listed = [name for name in said.get("enum", [said.get("const")]) if isinstance(name, str)]
        members = found.get("properties", {})
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


def _shown(value: Any) -> str:
    return repr(value)[:100]

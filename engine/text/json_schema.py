"""Answers questions about JSON schemas: their parts, references and types.

    parts, at             the schemas inside a schema, and their JSON pointers (RFC 6901)
    bundled               a part with all that it refers to, as a schema of its own
    types_of, choices_of  which values a part allows, where its keywords say so directly
    read_value            text without quotes → JSON

Schemas come from requests, as `engine.text.schema_reading` wrote them. All that follows references is bounded by a
count, not by a clock, so that the answer depends only on the input. No tokens, no torch, no HTTP.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, Final

from engine.errors import InvalidParameter

__all__ = [
    "ANNOTATIONS", "MAX_DEPTH", "TYPES", "alternatives", "at", "bundled", "check_depth", "choices_of", "decoded",
    "dotted", "encoded", "inner", "moved", "object_of", "parts", "pointed", "properties_of", "read_value", "resolved",
    "subschemas", "target_of", "types_of",
]  # fmt: skip

TYPES: Final = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
ANNOTATIONS: Final = frozenset(
    {
        "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema",
        "$id", "$defs", "definitions",
    }
)  # fmt: skip
"""Keywords that neither allow nor forbid values."""

MAX_DEPTH: Final = 100
_FOLLOWED: Final = 256  # parts that are looked at for one answer

_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES: Final = (
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties",
)  # fmt: skip


def parts(schema: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a schema and all schemas inside it, outer ones first, with their JSON pointers (RFC 6901)."""
    yield pointer, schema
    if not isinstance(schema, Mapping):
        return
    for key in _SINGLES:
        if isinstance(schema.get(key), Mapping):
            yield from parts(schema[key], f"{pointer}/{key}")
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            for i, part in enumerate(schema[key]):
                yield from parts(part, f"{pointer}/{key}/{i}")
    for key in _MAPS:
        if isinstance(schema.get(key), Mapping):
            for name, part in schema[key].items():
                yield from parts(part, f"{pointer}/{key}/{pointed(name)}")


def subschemas(schema: Any) -> Iterator[Any]:
    """Yield a schema and all schemas inside it, as `parts` does, without pointers: those may be long."""
    yield schema
    if isinstance(schema, Mapping):
        for key in _SINGLES:
            if isinstance(schema.get(key), Mapping):
                yield from subschemas(schema[key])
        for key in _LISTS:
            for part in schema[key] if isinstance(schema.get(key), list) else ():
                yield from subschemas(part)
        for key in _MAPS:
            for part in schema[key].values() if isinstance(schema.get(key), Mapping) else ():
                yield from subschemas(part)


def inner(part: Mapping[str, Any]) -> list[Any]:
    """Return the schemas directly inside one that apply to its values: not those that are only referred to."""
    found = [part[key] for key in _SINGLES if key in part]
    for key in _LISTS:
        found += part[key] if isinstance(part.get(key), list) else []
    for key in _MAPS:
        if key not in ("$defs", "definitions") and isinstance(part.get(key), Mapping):
            found += part[key].values()
    if isinstance(part.get("items"), list):  # of an older draft
        found += part["items"]
    return found


def at(schema: Any, pointer: str) -> Any:
    """Return what a JSON pointer points at.

    Raises:
        LookupError, ValueError: nothing is there.
    """
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list):
            schema = schema[int(step)]
        elif isinstance(schema, Mapping):
            schema = schema[step]
        else:
            raise LookupError(pointer)
    return schema


def pointed(name: Any) -> str:
    """Write a name as a step of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


def dotted(param: str, pointer: str) -> str:
    """Write what a JSON pointer points at, in a field of the request, as a dotted name."""
    return param + pointer.replace("/", ".").replace("~1", "/").replace("~0", "~")


def check_depth(value: Any, param: str) -> None:
    """Raise `InvalidParameter` for JSON of more than `MAX_DEPTH` levels."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
        if not level:
            return
    raise InvalidParameter(f"{param} is nested too deeply; {MAX_DEPTH} levels are allowed.", param=param)


def _children(node: dict[str, Any] | list[Any]) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node


def encoded(pointer: str) -> str:
    """Write a JSON pointer as a fragment of a URI (RFC 3986, 3.5)."""
    return re.sub(
        r"[^A-Za-z0-9._~!$&'()*+,;=:@/?-]",
        lambda letter: "".join(f"%{byte:02X}" for byte in letter[0].encode("utf-8", "surrogatepass")),
        pointer,
    )


def decoded(fragment: str) -> str:
    """Read a fragment of a URI: what `encoded` wrote."""
    data = fragment.encode("utf-8", "surrogatepass")
    data = re.sub(rb"%([0-9A-Fa-f]{2})", lambda code: bytes([int(code[1], 16)]), data)
    return data.decode("utf-8", "replace")


# -- references -------------------------------------------------------------------------------------------------------


def target_of(reference: str, root: Any) -> Any:
    """Return what a reference inside a document refers to; None if it leads nowhere or outside."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    try:
        return at(root, decoded(reference[1:]))
    except (LookupError, ValueError):
        return None


def resolved(schema: Any, root: Any, left: list[int] | None = None) -> Any:
    """Follow a part that is nothing but a reference (`$ref`, or `allOf` of one); itself if that leads nowhere.

    `left`: a count of steps for many answers together, which this one takes from; below 0, nothing is followed.
    """
    found = schema
    for _ in range(_FOLLOWED):
        if left is not None:
            left[0] -= 1
            if left[0] < 0:
                return schema
        said = set(found) - ANNOTATIONS if isinstance(found, Mapping) else set()
        if said == {"$ref"} and isinstance(found["$ref"], str):
            if left is not None:
                left[0] -= len(found["$ref"]) // 64
            found = target_of(found["$ref"], root)
            if found is None:
                return schema
        elif said == {"allOf"} and isinstance(found["allOf"], list) and len(found["allOf"]) == 1:
            found = found["allOf"][0]
        else:
            return found
    return schema


def moved(schema: Any, pointer: str) -> Any:
    """Return a schema with its references rewritten, to be put into another one at this pointer."""
    schema = deepcopy(schema)
    for inner in subschemas(schema):
        reference = inner.get("$ref") if isinstance(inner, dict) else None
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            inner["$ref"] = f"#{pointer}{reference[1:]}"
    return schema


def bundled(part: Any, root: Any) -> Any:
    """Make a part of `root` a schema of its own, with all that it refers to under `$defs`, once each."""
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = []

    def own(schema: Any) -> Any:
        schema = deepcopy(schema)
        for inner in subschemas(schema):
            if not isinstance(inner, dict) or not isinstance(inner.get("$ref"), str):
                continue
            target = target_of(inner["$ref"], root)
            if target is None:
                continue  # the compiler will say what is wrong
            if inner["$ref"] not in names:
                names[inner["$ref"]] = f"r{len(names)}"
                waiting.append((inner["$ref"], target))
            inner["$ref"] = f"#/$defs/{names[inner['$ref']]}"
        return schema

    def without_definitions(schema: Any) -> Any:
        if not isinstance(schema, Mapping):
            return schema
        return {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}

    whole = own(without_definitions(part))
    while waiting:
        reference, target = waiting.pop()
        definitions[names[reference]] = own(without_definitions(target))
    return {**whole, "$defs": definitions} if definitions else whole


# -- what a part allows -----------------------------------------------------------------------------------------------


def types_of(schema: Any, root: Any) -> frozenset[str]:
    """Return the JSON types that a part can allow; all of them where it does not restrict them."""
    return _types(schema, root, [_FOLLOWED], {})


def _types(schema: Any, root: Any, left: list[int], known: dict[int, frozenset[str]]) -> frozenset[str]:
    """`known`: the answers for parts by identity. Each is looked at once, however often it is referred to."""
    if schema is False:
        return frozenset()
    if not isinstance(schema, Mapping):
        return TYPES
    if id(schema) not in known:
        left[0] -= 1
        known[id(schema)] = TYPES  # where it refers to itself
        if left[0] >= 0:
            known[id(schema)] = _types_said(schema, root, left, known)
    return known[id(schema)]


def _types_said(
    schema: Mapping[str, Any], root: Any, left: list[int], known: dict[int, frozenset[str]]
) -> frozenset[str]:
    found = TYPES
    if isinstance(schema.get("$ref"), str):
        found &= _types(target_of(schema["$ref"], root), root, left, known)
    named = schema.get("type")
    if isinstance(named, str):
        named = [named]
    if isinstance(named, list):
        said = {name for name in named if isinstance(name, str)}
        found &= said | ({"integer"} if "number" in said else set())
    if "const" in schema:
        found &= _types_of_value(schema["const"])
    if isinstance(schema.get("enum"), list):
        found &= frozenset().union(*map(_types_of_value, schema["enum"]))
    for inner in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found &= _types(inner, root, left, known)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found &= frozenset().union(*(_types(inner, root, left, known) for inner in schema[key]))
    return found


def _types_of_value(value: Any) -> frozenset[str]:
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case str():
            return frozenset({"string"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"integer", "number"} if value.is_integer() else {"number"})
        case list():
            return frozenset({"array"})
    return frozenset({"object"})


def alternatives(schema: Any, root: Any) -> list[Any]:
    """Return the schemas of which a value must satisfy one: those that `anyOf` lists, with references followed.

    Only the schema itself if it has other keywords beside `anyOf`.
    """
    found: list[Any] = []
    waiting = [schema]
    for _ in range(_FOLLOWED):
        if not waiting:
            return found
        one = resolved(waiting.pop(), root)
        listed = one.get("anyOf") if isinstance(one, Mapping) else None
        if isinstance(listed, list) and listed and not set(one) - ANNOTATIONS - {"anyOf"}:
            waiting += reversed(listed)
        else:
            found.append(one)
    return [schema]


def choices_of(schema: Any, root: Any, left: list[int] | None = None) -> list[Any] | None:
    """Return the values of an `enum` or a `const`, if the part allows no others; None if it has neither.

    Values that a type or a length beside it forbids are left out. None, if it has any other keyword.
    `left`: a count of steps, as of `resolved`.
    """
    schema = resolved(schema, root, left)
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        values = [schema["const"]]
    elif isinstance(schema.get("enum"), list):
        values = list(schema["enum"])
    else:
        return None
    if left is not None:
        left[0] -= len(values)
    if set(schema) - ANNOTATIONS - {"enum", "const", "type", "minLength", "maxLength"}:
        return None  # to the caller it is then a keyword like the others
    kinds = types_of({"type": schema["type"]}, root) if "type" in schema else TYPES
    least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
    if not all(isinstance(n, int | float) for n in (least, most)):
        return None
    return [
        value
        for value in values
        if _types_of_value(value) & kinds and (not isinstance(value, str) or least <= len(value) <= most)
    ]


def object_of(parameters: Any) -> Mapping[str, Any]:
    """Return the schema of an object, following one that only refers to another and says that it is an object."""
    top = parameters
    if isinstance(top, Mapping) and top.get("type") == "object" and ("$ref" in top or "allOf" in top):
        top = {key: value for key, value in top.items() if key != "type"}
    found = resolved(top, parameters)
    if found is top:
        found = parameters
    return found if isinstance(found, Mapping) else {}


def properties_of(parameters: Any) -> dict[str, Any]:
    """Return the schemas of an object's members by name, with those that are only listed as required."""
    top = object_of(parameters)
    found = dict(top["properties"]) if isinstance(top.get("properties"), Mapping) else {}
    for key in top["required"] if isinstance(top.get("required"), list) else ():
        if isinstance(key, str):
            found.setdefault(key, top.get("additionalProperties", True))
    return found


def read_value(text: str, schema: Any, root: Any) -> str:
    """Convert a value written without quotes to JSON: a string if its schema says so, else JSON if it is valid.

    For `string or null`, `null` is null and `3.10` a string. JSON stays as it was written.
    """
    kinds = types_of(schema, root)
    if kinds != {"string"}:
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        if "string" not in kinds:
            return text.strip()
        plain = not isinstance(value, str) and not _is_infinite(value)
        if plain and any(_allows(leaf, value, root) for leaf in alternatives(schema, root)):
            return text.strip()
    return json.dumps(text, ensure_ascii=False)


def _allows(leaf: Any, value: Any, root: Any) -> bool:
    """Whether one alternative allows a value, as far as its types and choices say."""
    typed, choices = _types_of_value(value), choices_of(leaf, root)
    if choices is not None:
        return any(choice == value and _types_of_value(choice) == typed for choice in choices)
    return bool(typed & types_of(leaf, root))


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

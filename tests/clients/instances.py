"""A value that satisfies a JSON schema: what a scripted model says where a form is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jsonschema

_SIMPLE: dict[str, Any] = {"string": "four", "integer": 4, "number": 4.0, "boolean": True, "null": None}


def instance(schema: Any) -> Any:
    """Return one value that satisfies a schema, the smallest that is easily found; integers are 4 where they may be.

    Raises:
        jsonschema.ValidationError: none was found; the schema says more than is understood here.
    """
    value = _instance(schema, schema, 0)
    jsonschema.validate(value, schema)
    return value


def _instance(schema: Any, root: Any, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > 32:
        return "four"
    if "$ref" in schema:
        return _instance(_resolved(schema["$ref"], root), root, depth + 1)
    for key, value in (("const", schema.get("const")), ("default", schema.get("default"))):
        if key in schema:
            return value
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return _instance(schema[key][0], root, depth + 1)
    if schema.get("allOf"):
        merged: dict[str, Any] = {}
        for part in schema["allOf"]:
            part = _resolved(part["$ref"], root) if "$ref" in part else part
            merged |= {**part, "properties": {**merged.get("properties", {}), **part.get("properties", {})}}
        return _instance(merged, root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        named = schema.get("properties", {})
        return {name: _instance(named.get(name, {}), root, depth + 1) for name in schema.get("required", ())}
    if kind == "array":
        return [_instance(schema.get("items", {}), root, depth + 1)] * max(1, schema.get("minItems", 1))
    if kind in ("integer", "number"):
        return min(max(4, schema.get("minimum", 4)), schema.get("maximum", math.inf))
    return _SIMPLE[kind]


def _resolved(reference: str, root: Any) -> Any:
    """Follow a reference inside the document."""
    found = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        found = found[step.replace("~1", "/").replace("~0", "~")] if step else found
    return found

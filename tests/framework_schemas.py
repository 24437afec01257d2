"""Schemas as frameworks write them: what of each is enforced, what is left out and named, what is refused."""

from __future__ import annotations

from typing import Final

from jsonschema import Draft7Validator
from schema_rows import JSON, LOOKAHEAD, PYDANTIC, ZOD, I, Row, S, members

MCP = {
    "an object": Row({"type": "object"}, ({}, {"a": 1}), (1,)),
    "no members": Row({"type": "object", "properties": {}}, ({}, {"a": 1}), (1,)),
    "no required": Row(
        {"type": "object", "properties": {"url": {"type": "string", "format": "uri"}}},
        ({}, {"url": "https://a.b/c"}),
        ({"url": 1},),
        oracle=None,
    ),
    "anything beside": Row(
        {"type": "object", "properties": {"a": S}, "additionalProperties": {}}, ({"a": "x", "b": 1},), ({"a": 1},)
    ),
    "a list of anything": Row({"type": "array", "items": {}}, ([1, "a"],), (1,)),
    "a ring": Row({"$defs": {"J": JSON}, "$ref": "#/$defs/J"}, ("a", ["a", {"b": []}]), (1, [1])),
    "a ring of two": Row(
        {"$defs": {"A": members(b={"$ref": "#/$defs/B"}), "B": members(a={"$ref": "#/$defs/A"})}, "$ref": "#/$defs/A"},
        ({}, {"b": {"a": {}}}),
        ({"b": 1},),
    ),
    "a ring of nothing else": Row(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, **members(x={"$ref": "#/$defs/a"})},
        ({},),
        (1,),
        ("$defs.b.$ref",),
        "/$defs/b/$ref",
        oracle=None,
    ),
    "a ring that demands itself": Row(
        {"$defs": {"a": members(("b",), b={"$ref": "#/$defs/a"})}, **members(("x",), x={"$ref": "#/$defs/a"})},
        ({"x": {"b": 1}},),
        ({"x": 1},),
        ("$defs.a.properties.b.$ref",),
        "/$defs/a/properties/b/$ref",
        oracle=None,
    ),
    "either of two": Row(
        {**members(a=S, b=S), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, ({"a": "x"}, {"b": "x"}), ({},)
    ),
    "exactly one of two": Row(
        {**members(a=S, b=S), "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ({"a": "x"},),
        ({},),
        ("oneOf",),
        "/oneOf",
    ),
    "a reference to nowhere": Row(
        members(a={"$ref": "#/$defs/gone"}),
        ({"a": 1},),
        (1,),
        ("properties.a.$ref",),
        "/properties/a/$ref",
        oracle=None,
    ),
    "a reference elsewhere": Row(
        members(a={"$ref": "https://example.com/a.json"}),
        ({"a": 1},),
        (1,),
        ("properties.a.$ref",),
        "/properties/a/$ref",
        oracle=None,
    ),
    "names of keywords": Row(
        members(("$ref", "type"), **{"$ref": S, "type": S, "properties": I, "required": {"type": "boolean"}}),
        ({"$ref": "a", "type": "b"},),
        ({"$ref": "a"}, {"$ref": 1, "type": "b"}),
    ),
    "a huge enum": Row({"enum": [f"value {i}" for i in range(1500)]}, ("value 7", "value 1499"), ("value 1500",)),
    "a constant object": Row({"const": {"a": [1, {"b": None}]}}, ({"a": [1, {"b": None}]},), ({"a": [1]},)),
    "names that nobody allows": Row(
        {**members(("z",)), "additionalProperties": False}, ({},), (1,), ("required",), "/required", oracle=None
    ),
    "a name that is not described": Row(members(("z",)), ({"z": 1},), ({},)),
    "counted members": Row(
        {"type": "object", "properties": {"a": I, "b": I}, "minProperties": 1},
        ({"a": 1},),
        (1,),
        ("minProperties",),
        "/minProperties",
    ),
    "an identifier": Row(
        {
            "$id": "https://example.com/s",
            "$schema": "https://example.com/meta",
            **members(a={"$ref": "https://example.com/s#/$defs/x"}),
            "$defs": {"x": I},
        },
        ({"a": 1},),
        ({"a": "x"},),
        oracle=None,
    ),
    "an anchor": Row(
        {"$defs": {"x": {"$anchor": "here", **I}}, **members(a={"$ref": "#here"})}, ({"a": 1},), ({"a": "x"},)
    ),
    "a dynamic reference": Row(
        {"$dynamicAnchor": "node", **members(a={"$dynamicRef": "#node"})}, ({"a": {"a": {}}},), ({"a": 1},)
    ),
    "an identifier inside": Row(
        {
            "$defs": {
                "x": {
                    "$id": "https://example.com/x",
                    "type": "array",
                    "items": {"$ref": "#/$defs/y"},
                    "$defs": {"y": I},
                }
            },
            **members(a={"$ref": "https://example.com/x"}),
        },
        ({"a": [1]},),
        ({"a": ["x"]},),
    ),
    "a name that is encoded": Row(
        {"$defs": {"R[é]": I}, **members(a={"$ref": "#/$defs/R%5B%C3%A9%5D"})}, ({"a": 1},), ({"a": "x"},)
    ),
    "components": Row(
        {
            "components": {"schemas": {"X": {"type": "array", "items": {"$ref": "#/components/schemas/Y"}}, "Y": I}},
            **members(a={"$ref": "#/components/schemas/X"}),
        },
        ({"a": [1]},),
        ({"a": ["x"]},),
    ),
}

OTHERS = {
    "lookahead": Row(
        {"type": "string", "pattern": LOOKAHEAD}, ("aB", "ab"), (1,), ("pattern",), "/pattern", oracle=None
    ),
    "word boundary": Row({"type": "string", "pattern": r"\bfoo\b"}, ("foo",), (1,), ("pattern",), "/pattern"),
    "digits": Row({"type": "string", "pattern": r"^\d{2}$"}, ("12",), ("1a", "١٢"), oracle=None),
    "letters": Row({"type": "string", "pattern": r"^\p{L}+$"}, ("é",), ("1",), oracle=None),
    "pattern inside": Row({"type": "string", "pattern": "b"}, ("abc",), ("ac",)),
    "int32": Row({"type": "integer", "format": "int32"}, (2**31 - 1,), (2**31,), oracle=None),
    "int64": Row({"type": "integer", "format": "int64"}, (2**62,), (2**64,), oracle=None),
    "double": Row({"type": "number", "format": "double"}, (1.5,), ("x",)),
    "a format of another type": Row({"type": "integer", "format": "currency"}, (1,), ("x",), ("format",)),
    "bounds of int64": Row({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, (2**63 - 1,), (2**63,)),
    "bounds of doubles": Row(
        {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
        (1e30,),
        ("x",),
        ("minimum", "maximum"),
    ),
    "a least number beyond": Row(
        {"type": "number", "minimum": 1e300}, (1,), ("x",), ("minimum",), "/minimum", oracle=None
    ),
    "a greatest number beyond": Row(
        {"type": "number", "maximum": -1e308}, (1,), ("x",), ("maximum",), "/maximum", oracle=None
    ),
    "a least number of many digits": Row(
        {"type": "integer", "minimum": 10**400}, (1,), ("x",), ("minimum",), "/minimum", oracle=None
    ),
    "exclusive of draft 4 beyond": Row(
        {"type": "number", "minimum": 1e301, "exclusiveMinimum": True},
        (1,),
        ("x",),
        ("exclusiveMinimum",),
        "/exclusiveMinimum",
        oracle=None,
    ),
    "a greatest integer beyond int64": Row(
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, (0, 2**64 - 1), (-1, "x"), ("maximum",)
    ),
    "an exclusive integer beyond int64": Row(
        {"type": "integer", "exclusiveMaximum": 2**63}, (2**63 - 1,), (2**63, "x")
    ),
    "a least integer beyond int64": Row(
        {"type": "integer", "minimum": -(10**20)}, (-(10**20), 5), ("x",), ("minimum",)
    ),
    "uint64": Row({"type": "integer", "format": "uint64"}, (0, 2**64 - 1), (-1,), ("format",), oracle=None),
    "an integer of int64 or null": Row({"type": ["integer", "null"], "minimum": -(2**63)}, (-1, None), ("x",)),
    "an ambiguous dynamic reference": Row(
        {
            "$id": "https://example.com/l",
            "$ref": "list",
            "$defs": {
                "strings": {"$dynamicAnchor": "T", **S},
                "list": {
                    "$id": "list",
                    "type": "array",
                    "items": {"$dynamicRef": "#T"},
                    "$defs": {"T": {"$dynamicAnchor": "T"}},
                },
            },
        },
        (["a"], [1]),
        ("x",),
        ("$defs.list.items.$dynamicRef",),
        "/$defs/list/items/$dynamicRef",
        oracle=None,
    ),
    "a bound beyond": Row({"type": "number", "maximum": 1e25}, (1e20,), ("x",), ("maximum",), "/maximum"),
    "cents": Row({"type": "number", "multipleOf": 0.01}, (0.25,), (0.255,)),
    "minLength 0": Row({"type": "string", "minLength": 0}, ("",), (1,)),
    "a float for a count": Row({"type": "string", "minLength": 1.0, "maxLength": 2.0}, ("a",), ("", "abc")),
    "a length of a billion": Row({"type": "string", "maxLength": 1_000_000_000}, ("a",), (1,), ("maxLength",)),
    "a length of 2^53": Row({"type": "string", "maxLength": 2**53 - 1}, ("a",), (1,), ("maxLength",)),
    "contains": Row({"type": "array", "contains": S}, (["a"],), ("a",), ("contains",), "/contains"),
    "dependentRequired": Row(
        {**members(a=S, b=S), "dependentRequired": {"a": ["b"]}},
        ({"b": "x"},),
        (1,),
        ("dependentRequired",),
        "/dependentRequired",
    ),
    "dependencies": Row(
        {**members(a=S, b=S), "dependencies": {"a": ["b"]}},
        ({"b": "x"},),
        (1,),
        ("dependentRequired",),
        "/dependentRequired",
        oracle=Draft7Validator,
    ),
    "if": Row(
        {"type": "string", "if": {"minLength": 2}, "then": {"pattern": "a"}}, ("b",), (1,), ("if", "then"), "/if"
    ),
    "if without then": Row({"type": "string", "if": {"minLength": 2}}, ("b",), (1,)),
    "overlapping patterns": Row(
        {"type": "object", "patternProperties": {"^a": S, "b$": I}, "additionalProperties": False},
        ({"ac": "x"},),
        (1,),
        ("patternProperties", "additionalProperties"),
        "/patternProperties",
    ),
    "unevaluatedProperties": Row(
        {**members(("a",), a=S), "unevaluatedProperties": False}, ({"a": "x"},), ({"a": "x", "b": 1},)
    ),
    "unevaluatedProperties of TypeBox": Row(
        {"type": "object", "allOf": [members(("a",), a=S)], "unevaluatedProperties": False},
        ({"a": "x"},),
        ({},),
        ("unevaluatedProperties",),
        "/unevaluatedProperties",
    ),
    "true": Row(True, (1, "a")),
    "uniqueItems false": Row({"type": "array", "items": I, "uniqueItems": False}, ([1, 1],), (["a"],)),
    "nullable": Row({"type": "string", "nullable": True, "example": "x"}, ("a", None), (1,), oracle=None),
    "nullable enum": Row({"type": "string", "nullable": True, "enum": ["a"]}, ("a", None), ("b",), oracle=None),
    "nullable reference": Row(
        {"$defs": {"x": I}, **members(("a",), a={"allOf": [{"$ref": "#/$defs/x"}], "nullable": True})},
        ({"a": None}, {"a": 1}),
        ({"a": "x"},),
        oracle=None,
    ),
    "OpenAPI": Row(
        {
            "type": "object",
            "x-order": 1,
            "xml": {"name": "a"},
            "externalDocs": {"url": "u"},
            "properties": {"a": {**S, "x-a": 1}},
        },
        ({"a": "x"},),
        ({"a": 1},),
    ),
    "required of draft 3": Row(
        {"type": "object", "properties": {"a": {**S, "required": True}, "b": {**S, "required": False}}},
        ({"a": "x"},),
        ({"b": "x"}, {}),
        ("properties.b.required",),
        oracle=None,
    ),
    "a keyword that nobody knows": Row({"type": "string", "minLenght": 3}, ("a",), (1,), ("minLenght",)),
    "properties []": Row({"type": "object", "properties": []}, ({},), (1,), ("properties",), oracle=None),
    "required null": Row({**members(a=S), "required": None}, ({},), ({"a": 1},), ("required",), oracle=None),
    "description null": Row({**S, "description": None, "title": None}, ("a",), (1,), oracle=None),
    "items []": Row({"type": "array", "items": []}, ([1],), (1,), oracle=None),
    "type []": Row({"type": [], "minLength": 1}, ("a",), ("",), ("type",), oracle=None),
    "type null": Row({"type": None, "enum": ["a"]}, ("a",), ("b",), ("type",), oracle=None),
    "a member null": Row(members(a=None), ({"a": 1},), (1,), ("properties.a",), oracle=None),
    "enum []": Row(
        members(("a",), a={"enum": []}),
        ({"a": 1},),
        ({},),
        ("properties.a.enum",),
        "/properties/a/enum",
        oracle=None,
    ),
    "least above most": Row(
        {"type": "integer", "minimum": 5, "maximum": 3}, (1,), ("x", 4), ("minimum",), "/minimum", oracle=None
    ),
    "false": Row(members(("a",), a=False), ({"a": 1},), (1,), ("properties.a",), "/properties/a", oracle=None),
}

INVALID = {
    "Google's types": Row({"type": "OBJECT", "properties": {"a": {"type": "STRING"}}}, invalid="/type"),
    "Google's types inside": Row(members(a={"type": "STRING"}), invalid="/properties/a/type"),
    "Python's types": Row(members(a={"type": "str"}), invalid="/properties/a/type"),
    "any type": Row(members(a={"type": "any"}), invalid="/properties/a/type"),
    "a schema null": Row({"anyOf": [S, None]}, invalid="/anyOf/1"),
    "anyOf []": Row({"anyOf": []}, invalid="/anyOf"),
    "required as text": Row({**members(a=S), "required": "a"}, invalid="/required"),
    "a bound as text": Row({"type": "integer", "minimum": "0"}, invalid="/minimum"),
    "a length below 0": Row({"type": "string", "maxLength": -1}, invalid="/maxLength"),
    "half a length": Row({"type": "string", "maxLength": 1.5}, invalid="/maxLength"),
    "enum as text": Row({"enum": "a"}, invalid="/enum"),
    "multiples of 0": Row({"type": "number", "multipleOf": 0}, invalid="/multipleOf"),
    "members as a list": Row({"type": "object", "properties": [{"name": "a"}]}, invalid="/properties"),
}

ROWS: Final[dict[str, Row]] = {**PYDANTIC, **ZOD, **MCP, **OTHERS, **INVALID}

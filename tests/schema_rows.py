"""Schemas as pydantic and zod write them: rows of the table in `framework_schemas`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from jsonschema import Draft4Validator, Draft7Validator, Draft202012Validator

S: Final[dict[str, Any]] = {"type": "string"}
I: Final[dict[str, Any]] = {"type": "integer"}  # noqa: E741
DRAFT_7: Final = "http://json-schema.org/draft-07/schema#"


@dataclass(frozen=True)
class Row:
    """A schema, and what becomes of it.

    Attributes:
        good, bad: values that its grammar allows and does not allow, whether it is strict or not.
        left_out: what is left out, as dotted names in the schema; with `refused`, only without `strict`.
        refused: the pointer in the refusal with `strict`.
        invalid: the pointer in the refusal with and without `strict`.
        oracle: who else says of the values what the grammar says; None for a dialect that no validator knows.
    """

    schema: Any
    good: tuple[Any, ...] = ()
    bad: tuple[Any, ...] = ()
    left_out: tuple[str, ...] = ()
    refused: str | None = None
    invalid: str | None = None
    oracle: Any = Draft202012Validator


def members(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required]}


def closed(**properties: Any) -> dict[str, Any]:
    return {**members((*properties,), **properties), "additionalProperties": False}


CAT = {"title": "Cat", **members(("kind", "lives"), kind={"const": "cat", "title": "Kind", "type": "string"}, lives=I)}
DOG = {"title": "Dog", **members(("kind", "name"), kind={"const": "dog", "title": "Kind", "type": "string"}, name=S)}
UNION = {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}
MAPPING = {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}}
PETS = {"Cat": CAT, "Dog": DOG}
DEFAULTS = {name: {**pet, "required": pet["required"][1:]} for name, pet in PETS.items()}
WRONG_PETS = ({"kind": "cat", "lives": "many"}, {"kind": "cow", "lives": 1}, {"lives": 1})
LOOKAHEAD = "^(?=.*[A-Z]).{2,}$"
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
JSON = {
    "anyOf": [
        S,
        {"type": "array", "items": {"$ref": "#/$defs/J"}},
        {"type": "object", "additionalProperties": {"$ref": "#/$defs/J"}},
    ]
}
TREE = {
    "type": "object",
    "properties": {"v": I, "next": {"anyOf": [{"$ref": "#/$defs/T"}, {"type": "null"}]}},
    "required": ["v"],
    "additionalProperties": False,
}

PYDANTIC = {
    "model": Row(
        {"title": "M", "description": "A model.", **closed(name={"title": "Name", **S}, age=I)},
        ({"name": "a", "age": 1},),
        ({"name": "a"}, {"name": 1, "age": 1}),
    ),
    "Optional": Row(
        members(a={"anyOf": [I, {"type": "null"}], "default": None}), ({"a": None}, {"a": 1}, {}), ({"a": "x"},)
    ),
    "discriminated union": Row(
        {"$defs": PETS, **UNION, "discriminator": MAPPING},
        ({"kind": "cat", "lives": 9}, {"kind": "dog", "name": "x"}),
        WRONG_PETS,
    ),
    "union whose tag has a default": Row(
        {"$defs": DEFAULTS, **UNION, "discriminator": MAPPING}, ({"kind": "cat", "lives": 9},), WRONG_PETS, oracle=None
    ),
    "union in a list": Row(
        {"$defs": PETS, "type": "array", "items": {**UNION, "discriminator": MAPPING}},
        ([], [{"kind": "cat", "lives": 9}]),
        ([{"lives": 1}],),
    ),
    "Decimal": Row(
        members(("d",), d={"anyOf": [{"type": "number"}, {"type": "string", "pattern": DECIMAL}]}),
        ({"d": 1.5}, {"d": "1.5"}),
        ({"d": None},),
        ("properties.d.anyOf.1.pattern",),
        "/properties/d/anyOf/1/pattern",
    ),
    "datetime": Row(
        {"type": "string", "format": "date-time"}, ("2024-01-31T10:00:00Z",), ("2024-13-31T10:00:00Z", "x"), oracle=None
    ),
    "date": Row({"type": "string", "format": "date"}, ("2024-02-29",), ("2024-02-31",), oracle=None),
    "timedelta": Row({"type": "string", "format": "duration"}, ("P3D",), ("3 days",), oracle=None),
    "UUID": Row({"type": "string", "format": "uuid"}, ("123e4567-e89b-12d3-a456-426614174000",), ("123",), oracle=None),
    "UUID4": Row({"type": "string", "format": "uuid4"}, ("x",), (1,), ("format",), "/format"),
    "SecretStr": Row({"type": "string", "format": "password", "writeOnly": True}, ("x",), (1,)),
    "bytes": Row({"type": "string", "format": "binary"}, ("x",), (1,)),
    "Path": Row({"type": "string", "format": "path"}, ("/x",), (1,)),
    "AnyUrl": Row({"type": "string", "format": "uri", "minLength": 1}, ("https://example.com/a",), ("",), oracle=None),
    "recursive model": Row(
        {"$defs": {"T": TREE}, "$ref": "#/$defs/T"},
        ({"v": 1}, {"v": 1, "next": {"v": 2, "next": None}}),
        ({"next": None}, {"v": 1, "next": 2}),
    ),
    "Literal": Row({"enum": ["a", "b"], "type": "string"}, ("a",), ("c",)),
    "Literal of one": Row({"const": "a", "type": "string"}, ("a",), ("b",)),
    "Enum by reference": Row(
        {
            "$defs": {"E": {"enum": [1, 2], "type": "integer"}},
            **members(("e",), e={"allOf": [{"$ref": "#/$defs/E"}], "default": 1}),
        },
        ({"e": 2},),
        ({"e": 3},),
    ),
    "reference with a default": Row(
        {"$defs": {"E": {"enum": [1, 2]}}, **members(("e",), e={"$ref": "#/$defs/E", "default": 1})},
        ({"e": 2},),
        ({"e": 3},),
    ),
    "dict[str, int]": Row({"type": "object", "additionalProperties": I}, ({}, {"a": 1}), ({"a": "x"},)),
    "dict by pattern": Row(
        {"type": "object", "patternProperties": {"^x-": S}, "additionalProperties": False},
        ({"x-a": "b"},),
        ({"x-a": 1}, {"a": "b"}),
    ),
    "tuple": Row(
        {"type": "array", "prefixItems": [S, I], "minItems": 2, "maxItems": 2}, (["a", 1],), (["a"], [1, "a"])
    ),
    "set": Row(
        {"type": "array", "items": I, "uniqueItems": True}, ([1, 2],), (["a"],), ("uniqueItems",), "/uniqueItems"
    ),
    "constr": Row(
        {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3}, ("ab",), ("a", "abcd", "A1")
    ),
    "conint": Row({"type": "integer", "exclusiveMinimum": 0, "maximum": 9}, (1, 9), (0, 10)),
    "multiple_of": Row({"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 20}, (5, 20), (7, 25)),
    "extra=allow": Row({**members(("a",), a=I), "additionalProperties": True}, ({"a": 1, "b": "x"},), ({"b": 1},)),
    "JsonValue": Row({**members(("a",), a={})}, ({"a": [None]},), ({},)),
    "annotations": Row(
        {
            "type": "string",
            "title": "T",
            "default": "x",
            "examples": ["y"],
            "deprecated": True,
            "readOnly": True,
            "contentMediaType": "application/json",
        },
        ("z",),
        (1,),
    ),
}

ZOD = {
    "zod 3": Row(
        {"$schema": DRAFT_7, **closed(a=S, b={"type": ["string", "null"]})},
        ({"a": "x", "b": None},),
        ({"a": "x"},),
        oracle=Draft7Validator,
    ),
    "a named schema": Row(
        {"$ref": "#/definitions/x", "definitions": {"x": closed(a=I)}, "$schema": DRAFT_7},
        ({"a": 1},),
        ({"a": "x"},),
        oracle=Draft7Validator,
    ),
    "a schema used twice": Row(
        closed(a=closed(x=I), b={"$ref": "#/properties/a"}),
        ({"a": {"x": 1}, "b": {"x": 2}},),
        ({"a": {"x": 1}, "b": {"x": "y"}},),
    ),
    "lazy": Row(
        {
            "$schema": DRAFT_7,
            "$ref": "#/definitions/n",
            "definitions": {"n": closed(c={"type": "array", "items": {"$ref": "#/definitions/n"}})},
        },
        ({"c": []}, {"c": [{"c": []}]}),
        ({"c": [1]},),
        oracle=Draft7Validator,
    ),
    "nullable object": Row({"anyOf": [closed(a=I), {"type": "null"}]}, (None, {"a": 1}), ({"a": None},)),
    "never": Row(members(a={"not": {}}), ({},), (1,), ("properties.a.not",), "/properties/a/not"),
    "any": Row({"$schema": DRAFT_7}, (1, "a", None, {})),
    "tuple of zod 3": Row(
        {"type": "array", "minItems": 2, "maxItems": 2, "items": [S, I]},
        (["a", 1],),
        (["a"], [1, 1]),
        oracle=Draft7Validator,
    ),
    "tuple without more": Row(
        {"type": "array", "items": [S], "additionalItems": False}, (["a"],), (["a", 1],), oracle=Draft7Validator
    ),
    "positive of draft 4": Row(
        {"type": "integer", "minimum": 0, "exclusiveMinimum": True}, (1,), (0,), oracle=Draft4Validator
    ),
    "not exclusive of draft 4": Row(
        {"type": "integer", "minimum": 0, "exclusiveMinimum": False}, (0,), (-1,), oracle=Draft4Validator
    ),
    "int of zod 4": Row({"type": "integer", "minimum": -(2**53 - 1), "maximum": 2**53 - 1}, (2**53 - 1,), (2**53,)),
    "record of zod 4": Row(
        {"type": "object", "propertyNames": S, "additionalProperties": I}, ({"a": 1},), ({"a": "x"},)
    ),
    "record by an enum": Row(
        {"type": "object", "propertyNames": {"enum": ["a", "b"], "type": "string"}, "additionalProperties": I},
        ({"a": 1}, {}),
        ({"c": 1}, {"a": "x"}),
    ),
    "record by a pattern": Row(
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": I},
        ({"a": 1},),
        ({"A": 1}, {"a": "x"}),
    ),
    "record by a lookahead": Row(
        {"type": "object", "propertyNames": {"pattern": LOOKAHEAD}},
        ({"aB": 1},),
        (1,),
        ("propertyNames",),
        "/propertyNames",
    ),
    "record by a length": Row(
        {"type": "object", "propertyNames": {"minLength": 2}}, ({"ab": 1},), (1,), ("propertyNames",), "/propertyNames"
    ),
    "email of zod 4": Row(
        {"type": "string", "format": "email", "pattern": EMAIL}, ("a@example.com",), ("a",), ("pattern",), "/pattern"
    ),
    "nested enum": Row(closed(a={"type": "string", "enum": ["x", "y"]}), ({"a": "x"},), ({"a": "z"},)),
    "intersection": Row(
        {"allOf": [members(("a",), a=S), members(("b",), b=I)]}, ({"a": "x", "b": 1},), ({"a": "x"}, {"b": 1})
    ),
    "union with overlap": Row({"oneOf": [{"type": "number"}, I]}, (1.5,), ("x",), ("oneOf",), "/oneOf"),
    "discriminated union without a name": Row({"$defs": PETS, **UNION}, ({"kind": "cat", "lives": 9},), WRONG_PETS),
    "cuid": Row(
        {"type": "string", "format": "cuid", "pattern": "^c[a-z0-9]{3}$"}, ("c123",), ("x123",), ("format",), "/format"
    ),
    "maximal safe length": Row({"type": "array", "items": I, "maxItems": 2**53 - 1}, ([1],), (["a"],)),
}

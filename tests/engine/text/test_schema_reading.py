"""Reading a schema keeps what it says; whatever a request holds is read or refused; what was read is never refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from framework_schemas import INVALID, ROWS
from hypothesis import HealthCheck, given, settings, strategies as st
from jsonschema import Draft202012Validator
from schema_rows import I, S

from engine import Constraint, InvalidParameter
from engine.errors import panicked
from engine.grammar.answer_grammar import answer_grammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.token_table import TokenTable
from engine.text.json_schema import at, target_of
from engine.text.schema_reading import read_schema
from engine.text.schema_rings import unending

NAMES = st.sampled_from(["a", "b", "c/d~"])
COUNTS = st.integers(0, 3)
LEAVES = st.sampled_from(
    [{}, {"type": "string"}, {"type": "integer"}, {"const": "x"}, {"enum": [1, None]}, {"$ref": "#/$defs/a"},
     {"$ref": "#/$defs/b"}, {"$ref": "#/$defs/gone"}, {"$ref": "#"}, True, False]
)  # fmt: skip
VALUES = st.recursive(
    st.sampled_from([None, True, 0, 1, 2, -1, 1.5, "", "x", "yy"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists, maps = st.lists(inner, min_size=1, max_size=2), st.dictionaries(NAMES, inner, max_size=2)
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from(["object", "array", "string", "integer", ["object", "null"]]),
        "properties": maps, "required": st.lists(NAMES, max_size=2, unique=True), "additionalProperties": inner,
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b"]), inner, max_size=1),
        "propertyNames": st.sampled_from([{}, {"enum": ["a", 1]}, {"pattern": "^a"}, {"minLength": 2}, {"const": "b"}]),
        "minProperties": COUNTS, "maxProperties": COUNTS, "items": inner, "prefixItems": lists, "minItems": COUNTS,
        "maxItems": COUNTS, "uniqueItems": st.booleans(), "contains": inner, "minContains": COUNTS,
        "minLength": COUNTS, "maxLength": COUNTS, "pattern": st.sampled_from(["^x", "y", "(?=x)"]),
        "minimum": st.integers(-2, 2), "exclusiveMaximum": st.integers(-1, 3), "multipleOf": st.integers(1, 3),
        "anyOf": lists, "oneOf": lists, "allOf": lists, "not": inner, "if": inner, "then": inner, "else": inner,
        "dependentRequired": st.just({"a": ["b"]}), "unevaluatedProperties": inner, "title": st.just("t"),
        "discriminator": st.just({"propertyName": "a"}),
    }  # fmt: skip
    return st.sets(st.sampled_from(sorted(keywords)), max_size=4).flatmap(
        lambda chosen: st.fixed_dictionaries({name: keywords[name] for name in chosen})
    )


SCHEMAS = st.recursive(LEAVES, _schemas, max_leaves=6)
ROOTS = st.tuples(_schemas(SCHEMAS), SCHEMAS, SCHEMAS).map(lambda t: {**t[0], "$defs": {"a": t[1], "b": t[2]}})
ANYTHING = st.dictionaries(
    st.sampled_from(
        ["type", "properties", "required", "items", "anyOf", "oneOf", "$ref", "$id", "$anchor", "enum", "minimum",
         "exclusiveMinimum", "maxLength", "dependencies", "propertyNames", "nullable", "discriminator", "$defs", "zz"]
    ),
    VALUES | st.sampled_from([1e999, 1e308, 10**400, "object", "#/a", "#", "a:b", "//", "%ff"]),
    max_size=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """For a vocabulary of single bytes."""
    tokens = [*(bytes([i]) for i in range(256)), b"\xff<end>"]
    return GrammarCompiler.from_table(TokenTable(tokens, [256], {"<end>": 256}, [256]))


def _valid(schema: Any, value: Any) -> bool | None:
    try:
        return bool(Draft202012Validator(schema).is_valid(value))
    except BaseException as error:  # a reference to nowhere, or in circles
        if not isinstance(error, Exception) and not panicked(error):
            raise
        return None


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=ROOTS, value=VALUES)
def test_reading_keeps_what_a_schema_says(schema: Any, value: Any) -> None:
    """A tag that a discriminator names is required, which may forbid more; nothing else changes."""
    read = read_schema(schema, "here")
    before, after = _valid(schema, value), _valid(read.schema, value)
    if before is None or after is None:
        return
    assert before == after or (before and "discriminator" in json.dumps(schema))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=ANYTHING | ROOTS)
def test_whatever_comes_is_read_or_refused(schema: Any) -> None:
    before = json.dumps(schema)
    try:
        read = read_schema(schema, "here")
    except InvalidParameter as error:
        at(schema, error.details.get("pointer", ""))  # which raises where nothing is
        return
    assert json.dumps(schema) == before
    again = read_schema(read.schema, "here")
    assert (again.schema, again.left_out) == (read.schema, ())
    for pointer in read.left_out:
        at(schema, pointer)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=ROOTS | ANYTHING)
def test_what_was_read_is_never_refused_without_strict(compiler: GrammarCompiler, schema: Any) -> None:
    try:
        read = read_schema(schema, "here").schema
    except InvalidParameter:
        return
    made = answer_grammar(compiler, Constraint("json", read, strict=False, param="here"))
    assert compiler.start(made.text)


def test_the_request_is_not_changed() -> None:
    for name in ROWS.keys() - INVALID.keys():
        before = json.dumps(ROWS[name].schema)
        read_schema(ROWS[name].schema, "here")
        assert json.dumps(ROWS[name].schema) == before, name


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("#/$defs/x", {"type": "integer"}),
        ("https://example.com/root#/$defs/x", {"type": "integer"}),
        ("root#/$defs/x", {"type": "integer"}),
        ("#here", {"type": "integer"}),
        ("item.json", {"type": "boolean"}),
        ("/item.json#", {"type": "boolean"}),
        ("https://example.com/item.json", {"type": "boolean"}),
        ("https://example.com/other.json", None),
        ("#gone", None),
        ("#/$defs/gone", None),
    ],
)
def test_references_by_name(reference: str, found: Any) -> None:
    schema = {
        "$id": "https://example.com/root",
        "$defs": {"x": {"$anchor": "here", "type": "integer"}, "y": {"$id": "item.json", "type": "boolean"}},
        "properties": {"a": {"$ref": reference}},
    }
    read = read_schema(schema, "here").schema
    assert target_of(read["properties"]["a"]["$ref"], read) == found


def _two(target: Any, reference: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": target, "y": {"$ref": reference}}}


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (_two({"nullable": True, "anyOf": [S, I]}, "#/properties/x/anyOf/0"), S),
        (_two({"nullable": True, "anyOf": [S, I]}, "#/properties/x/anyOf/1"), I),
        (_two({"nullable": True, "allOf": [S]}, "#/properties/x/allOf/0"), S),
        (_two({"nullable": True, "oneOf": [S, I]}, "#/properties/x/oneOf/1"), I),
        (_two({"nullable": True, "anyOf": [{"nullable": True, "not": S}]}, "#/properties/x/anyOf/0/not"), S),
        (_two({"nullable": True, "type": "string"}, "#/properties/x"), {"type": ["string", "null"]}),
        (_two({"items": [S], "additionalItems": I}, "#/properties/x/items/0"), S),
        (_two({"items": [S], "additionalItems": I}, "#/properties/x/additionalItems"), I),
        (_two({"additionalItems": I}, "#/properties/x/additionalItems"), I),
        (_two({"propertyNames": S}, "#/properties/x/propertyNames"), S),
        (_two({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": I}, "#/properties/x/propertyNames"),
         {"enum": ["a", "b"]}),
        (_two({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": I},
              "#/properties/x/additionalProperties"), I),
        (_two({"propertyNames": {"enum": ["a"]}, "properties": {"z": True}}, "#/properties/x/properties/z"), True),
        (_two({"unevaluatedProperties": S}, "#/properties/x/unevaluatedProperties"), S),
        (_two({"if": S}, "#/properties/x/if"), S),
        (_two({"then": False}, "#/properties/x/then"), False),
        (_two({"dependencies": {"a": S}}, "#/properties/x/dependencies/a"), S),
        (_two({"zz": {"$ref": "#/properties/x/zz/zz", "zz": S}}, "#/properties/x/zz/zz"), S),
        (_two({"k" * 5_000: S, "$defs": {"k" * 5_000: {"$anchor": "far", **I}}}, "#far"), I),
        (_two({"nullable": True, "$ref": "#/$defs/x"}, "#/properties/x/anyOf/1"), None),
        (_two(S, "#/$defs/at0:x"), None),
        (_two(S, "#/properties/x/-1"), None),
    ],
)  # fmt: skip
def test_references_follow_what_reading_moves_or_drops(schema: Any, found: Any) -> None:
    read = read_schema(schema, "here").schema
    assert target_of(read["properties"]["y"]["$ref"], read) == found


def test_copies_take_no_name_of_the_schema() -> None:
    properties = {"y": {"$ref": "#/components/X"}, "z": {"$ref": "#/$defs/at0:X"}}
    read = read_schema({"$defs": {"at0:X": I}, "components": {"X": S}, "properties": properties}, "here").schema
    assert [target_of(read["properties"][name]["$ref"], read) for name in "yz"] == [S, I]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("also", [{}, {"allOf": [{"minLength": 1}]}, {"nullable": True}])
def test_all_references_of_a_schema_count(order: int, also: dict[str, Any]) -> None:
    both = [("$ref", "#/$defs/a"), ("$dynamicRef", "#/$defs/b")][::order]
    read = read_schema({**dict(both), "$defs": {"a": {"type": ["string", "integer"]}, "b": S}, **also}, "here").schema
    assert [_valid(read, value) for value in ("x", 1, None)] == [True, False, bool(also.get("nullable"))]


@pytest.mark.parametrize(
    ("inner", "read"),
    [
        ({"$dynamicAnchor": "T"}, {"$dynamicRef": "#T"}),
        ({"$anchor": "T"}, {"$ref": "#"}),
        ({}, {"$ref": "#"}),
    ],
)
def test_a_dynamic_reference_is_read_if_it_can_name_one_part_only(inner: Any, read: Any) -> None:
    """Else it stays, and is refused or named as every keyword that cannot be enforced."""
    schema = {"$dynamicAnchor": "T", "items": {"$dynamicRef": "#T"}, "$defs": {"a": {"$id": "a:b", **inner}}}
    assert read_schema(schema, "here").schema["items"] == read


def test_a_recursive_reference_is_read_if_it_can_name_one_part_only() -> None:
    schema = {"$recursiveAnchor": True, "items": {"$recursiveRef": "#"}}
    assert read_schema(schema, "here").schema["items"] == {"$ref": "#"}
    schema["$defs"] = {"a": {"$id": "a:b", "$recursiveAnchor": True}}
    assert read_schema(schema, "here").schema["items"] == {"$recursiveRef": "#"}


@pytest.mark.parametrize(
    ("base", "own", "reference"),
    [
        ({"id": "https://example.com/r.json"}, {"id": "#foo"}, "#foo"),
        ({"id": "https://example.com/r.json"}, {"id": "a/b.json"}, "https://example.com/a/b.json"),
        ({}, {"id": "#foo"}, "#foo"),
        ({}, {"$id": "#foo"}, "#foo"),
        ({}, {"$id": "c.json#foo"}, "c.json#foo"),
        ({"$id": "https://example.com/a/b.json"}, {"$id": "./c.json"}, "c.json"),
        ({"$id": "https://example.com/a/b.json"}, {"$id": "../c.json"}, "/c.json"),
        ({"$id": "https://example.com/a/b.json"}, {"$id": "../../../c.json"}, "https://example.com/c.json"),
        ({"$id": "https://example.com"}, {"$id": "c.json"}, "https://example.com/c.json"),
        ({"$id": "https://example.com/a/b.json"}, {"$id": "//example.org/c.json"}, "https://example.org/c.json"),
        ({"$id": "https://example.com/a/b.json"}, {"$id": "./d/./c.json"}, "d/x/../c.json"),
        ({}, {"$id": "./c.json"}, "c.json"),
        ({}, {"$id": "urn:x:y"}, "urn:x:y"),
    ],
)
def test_identifiers_of_every_draft(base: Any, own: Any, reference: str) -> None:
    schema = {**base, "definitions": {"a": {**own, **I}, "b": S}, "properties": {"x": {"$ref": reference}}}
    read = read_schema(schema, "here").schema
    assert target_of(read["properties"]["x"]["$ref"], read) == I


def test_an_id_that_is_only_a_name() -> None:
    """In draft 4 it is what `#` is relative to; where nothing is there, whoever wrote it meant the document."""
    inner = {"id": "A", "properties": {"y": {"$ref": "#/definitions/B"}}}
    for own, found in (({}, S), ({"definitions": {"B": I}}, I)):
        read = read_schema({"definitions": {"A": {**inner, **own}, "B": S}}, "here").schema
        assert target_of(read["definitions"]["A"]["properties"]["y"]["$ref"], read) == found


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {}}}], "propertyNames": {"enum": ["a", "b"]}, "unevaluatedProperties": False},
        {"allOf": [{"propertyNames": {"enum": ["a", "b"]}}], "unevaluatedProperties": False},
        {"allOf": [{"propertyNames": {"pattern": "^[ab]$"}}], "unevaluatedProperties": False},
        {
            "$ref": "#/components/x",
            "components": {"x": {"propertyNames": {"const": "b"}}},
            "unevaluatedProperties": False,
        },
        {"if": {"properties": {"a": {}}}, "unevaluatedProperties": False},
        {"allOf": [{"if": {"properties": {"a": {}}}}], "unevaluatedProperties": False},
        {"if": {"prefixItems": [{}]}, "unevaluatedItems": False},
    ],
)
@pytest.mark.parametrize("value", [{}, {"a": 1}, {"b": 1}, {"c": 1}, [], [1], [1, 2]])
def test_what_is_unevaluated_stays_so(schema: Any, value: Any) -> None:
    assert _valid(read_schema(schema, "here").schema, value) == _valid(schema, value)


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ({"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}, None),
        ({"type": "array", "items": {"$ref": "#/$defs/n"}}, None),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}, None),
        ({"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1}, "/$defs/n/items"),
        ({"type": "array", "prefixItems": [{"$ref": "#/$defs/n"}], "minItems": 1}, "/$defs/n/prefixItems/0"),
        ({"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}, "/$defs/n/properties/n"),
        ({"allOf": [{"$ref": "#/$defs/n"}]}, "/$defs/n/allOf/0"),
        ({"$ref": "#/$defs/n"}, "/$defs/n"),
    ],
)
def test_a_ring_ends_or_is_found(part: Any, where: str | None) -> None:
    assert unending({"$ref": "#/$defs/n", "$defs": {"n": part}}) == where

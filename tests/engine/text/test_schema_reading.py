"""Reading a schema keeps what it says; whatever a request holds is read or refused; what was read is never refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from framework_schemas import INVALID, ROWS
from hypothesis import HealthCheck, given, settings, strategies as st
from jsonschema import Draft202012Validator

from engine import Constraint, InvalidParameter
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
    except Exception:  # a reference to nowhere, or in circles
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

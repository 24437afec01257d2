"""Schemas that a stranger made to be costly: refused on their size, or read in time and memory that follow it.

A hundred times the time or memory of these would end the test; nothing here looks at a clock.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from engine import Constraint, InvalidParameter, Tool
from engine.grammar.diagnosis import MAX_BYTES
from engine.grammar.request_schemas import read_schemas
from engine.text import schema_unions
from engine.text.json_schema import types_of

NAME = "k" * 120_000
MOST_MEMORY = 100_000_000  # bytes; with a pointer for each of its parts, a schema below took 500,000,000 or more


def _many(value: Any, n: int = 5_000) -> dict[str, Any]:
    return {f"p{i}": value for i in range(n)}


COSTLY: dict[str, Callable[[], dict[str, Any]]] = {
    "members below a long name": lambda: {"properties": {NAME: {"properties": _many({})}}},
    "unknown keywords below a long name": lambda: {"properties": {NAME: _many(1)}},
    "members that are null below a long name": lambda: {"properties": {NAME: {"properties": _many(None)}}},
    "anchors below a long name": lambda: {
        "$id": "https://example.com/" + "a" * 2_000,
        "properties": {NAME: {"$defs": {f"p{i}": {"$anchor": f"a{i}"} for i in range(3_000)}}},
    },
    "references to a long name": lambda: {
        "$defs": {NAME: {"$anchor": "a", "type": "string"}},
        "properties": _many({"$ref": "#a"}),
    },
    "one of a long name": lambda: {"properties": {NAME: {"oneOf": [{"type": "null"}] * 5_000}}},
    "required members": lambda: {"properties": _many({"required": True}, 8_000)},
    "names beside members": lambda: {
        "properties": _many({}, 6_000),
        "propertyNames": {"enum": [f"q{i}" for i in range(8_000)]},
    },
    "something long for each of many names": lambda: {
        "propertyNames": {"enum": [f"q{i}" for i in range(5_000)]},
        "additionalProperties": {"enum": ["x" * 100_000]},
    },
    "alternatives that have many members": lambda: {
        "$defs": {"a": {"type": "object", "properties": _many({"enum": []}, 4_000)}},
        "oneOf": [{"$ref": "#/$defs/a"}] * 4_000,
    },
    "alternatives that require many members": lambda: {
        "$defs": {"a": {"type": "object", "properties": _many({}, 4_000), "required": [f"p{i}" for i in range(4_000)]}},
        "oneOf": [{"$ref": "#/$defs/a"}] * 4_000,
    },
    "alternatives behind chains of references": lambda: {
        "$defs": {f"r{i}": {"$ref": f"#/$defs/r{i + 1}"} for i in range(250)} | {"r250": {"type": "object"}},
        "oneOf": [{"$ref": "#/$defs/r0"}] * 8_000,
    },
    "an enum that is named again and again": lambda: {
        "$defs": {"a": {"enum": [{}] * 55_000}},
        "allOf": [{"$ref": "#/$defs/a"}] * 255,
    },
    "names like those of copies": lambda: {
        "$defs": {f"at{i}:X": {} for i in range(3_000)},
        "components": [{"X": {}} for _ in range(1_500)],
        "properties": {f"p{i}": {"$ref": f"#/components/{i}/X"} for i in range(1_500)},
    },
}


@pytest.mark.parametrize("name", COSTLY)
def test_reading_costs_what_a_schema_is_long(name: str) -> None:
    schema = {"type": "object", **COSTLY[name]()}
    assert len(json.dumps(schema)) < MAX_BYTES
    tracemalloc.start()
    try:
        read = read_schemas(Constraint("json", schema, False, "form"), ())
        assert read.constraint is not None
        assert len(json.dumps(read.constraint.value)) < 10 * MAX_BYTES
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def test_what_is_too_large_is_refused_before_it_is_read() -> None:
    """The schema is no schema, so whoever reads it says something else."""
    bad = {"type": "object", "properties": 1, "description": "x" * 200_000}
    large = {"type": "object", "properties": 1, "description": "x" * MAX_BYTES}
    for constraint, tools, param, said in (
        (Constraint("json", large, False, "form"), (), "form", "262144"),
        (None, (Tool("f", "", {}), Tool("g", "", large)), "tools.1.function.parameters", "262144"),
        (Constraint("json", bad, False, "form"), (Tool("f", "", bad),) * 5, "tools", "1,000,000"),
    ):
        with pytest.raises(InvalidParameter, match=said) as raised:
            read_schemas(constraint, tools)
        assert raised.value.param == param


def test_a_long_identifier_is_refused_where_it_is() -> None:
    """Those relative to it would each be as long."""
    schema = {"$id": f"https://example.com/{'a' * 3_000}/", "$defs": {"a": {"$id": "b"}}}
    with pytest.raises(InvalidParameter, match="2,048") as raised:
        read_schemas(Constraint("json", schema, False, "form"), ())
    assert raised.value.details["pointer"] == "/$id"


def test_names_of_what_is_left_out_are_bounded() -> None:
    members = {f"p{i}": {"type": "string", "required": True} for i in range(100)}
    read = read_schemas(Constraint("json", {"properties": members, "z": 1}, False, "form"), ())
    assert read.left_out == ("form.z",)  # members that say that they are required take none of the places
    assert len(read_schemas(Constraint("json", _many(1), False, "form"), ()).left_out) == 64


def test_the_search_for_a_tag_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound, alternatives are not told apart; within it they are."""
    branches = [
        {"type": "object", "properties": {"k": {"const": f"{i}"}}, "required": ["k"], "additionalProperties": False}
        for i in range(20)
    ]
    for steps, told in ((200, True), (100, False)):
        monkeypatch.setattr(schema_unions, "_STEPS", steps)
        read = read_schemas(Constraint("json", {"oneOf": branches}, False, "form"), ()).constraint
        assert read is not None
        assert ("discriminator" in read.value) == told


@pytest.mark.parametrize("n", [1, 300, 30_000])
def test_types_of_parts_that_are_named_often(n: int) -> None:
    schema = {"$defs": {"a": {"enum": ["x"] * n}}, "allOf": [{"$ref": "#/$defs/a"}] * n, "type": ["string", "null"]}
    assert types_of(schema, schema) == {"string"}

"""Schemas as frameworks write them: enforced, left out and named, or refused; the same whatever stands beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from framework_schemas import INVALID, ROWS, Row, members
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, TypeAdapter
from tool_forms import FORMATS, HERMES, written

from engine import LLM, ChatMessage, Constraint, InvalidParameter, Tool, ToolChoice
from engine.grammar.answer_grammar import ReplyGrammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.reply_grammar import GrammarSource, reply_grammar
from engine.grammar.request_schemas import read_schemas
from engine.grammar.token_table import TokenTable
from engine.text.schema_check import unenforced_errors
from engine.text.schema_reading import read_schema

FORM = "response_format.json_schema.schema"
REQUIRED = ToolChoice("required")
STRICT_NEIGHBOUR = Tool("g", parameters=members(("x",), x={"type": "boolean"}), strict=True)
LOOSE_NEIGHBOUR = Tool("g", parameters=members(x={"type": "array", "uniqueItems": True}))
NEIGHBOURS = {"alone": (), "beside a strict one": (STRICT_NEIGHBOUR,), "beside one that is not": (LOOSE_NEIGHBOUR,)}
LISTED = [name for name in ROWS if name not in INVALID]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """For a vocabulary of single bytes."""
    tokens = [*(bytes([i]) for i in range(256)), b"\xff<end>"]
    return GrammarCompiler.from_table(TokenTable(tokens, [256], {"<end>": 256}, [256]))


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=1024)


def accepts(compiler: GrammarCompiler, grammar: str, text: str) -> bool:
    state = compiler.start(grammar)
    for byte in text.encode():
        if state.stopped or not compiler.allowed(state)[byte]:
            return False
        state.consume(byte)
    return state.accepting


def as_form(compiler: GrammarCompiler, schema: Any, strict: bool) -> tuple[str, set[str]]:
    """The grammar of an answer, and what is left out of it."""
    read = read_schemas(Constraint("json", schema, strict, FORM), ())
    made = reply_grammar(compiler, GrammarSource(read.constraint))
    return made.text, {*made.left_out, *read.left_out}


def as_tools(compiler: GrammarCompiler, tools: tuple[Tool, ...], form: str = "hermes") -> tuple[str, set[str]]:
    """The grammar of a call of one of these tools, and what is left out of it."""
    read = read_schemas(None, tools)
    source = GrammarSource(None, read.tools, FORMATS[form], REQUIRED, parallel_tool_calls=False)
    made: ReplyGrammar = reply_grammar(compiler, source)
    return made.text, {*made.left_out, *read.left_out}


def argument(row: Row) -> dict[str, Any]:
    """The parameters of a tool with one argument of a row's schema."""
    return members(("v",), v=moved(row.schema, "/properties/v"))


def moved(part: Any, to: str) -> Any:
    """A schema with its references rewritten for another place, those relative to an identifier aside."""
    if isinstance(part, list):
        return [moved(one, to) for one in part]
    if not isinstance(part, dict) or "$id" in part:
        return part
    found = {key: moved(value, to) for key, value in part.items()}
    if isinstance(reference := part.get("$ref"), str) and reference.startswith("#/"):
        found["$ref"] = f"#{to}{reference[1:]}"
    return found


def spelled(value: Any) -> str:
    return (
        format(value, "f").rstrip("0")
        if isinstance(value, float) and value < 1e6
        else json.dumps(value, ensure_ascii=False)
    )


def test_there_are_enough_of_them() -> None:
    assert len(ROWS) >= 100


@pytest.mark.parametrize("name", LISTED)
def test_the_table_itself_is_right(name: str) -> None:
    """Another validator says of the values what the table says; else ours does, of the schema as it was read."""
    row = ROWS[name]
    if row.oracle is not None:
        good = [row.oracle(row.schema).is_valid(value) for value in row.good]
        assert all(good), good
        if not row.left_out:  # or others may be let through, but never these
            assert not any(row.oracle(row.schema).is_valid(value) for value in row.bad)
    else:
        read = read_schema(row.schema, FORM).schema
        if row.refused is None:
            assert [unenforced_errors(spelled(value), read) for value in row.good] == [None] * len(row.good)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("name", LISTED)
def test_an_answer(compiler: GrammarCompiler, name: str, strict: bool) -> None:
    row = ROWS[name]
    if strict and row.refused is not None:
        with pytest.raises(InvalidParameter) as raised:
            as_form(compiler, row.schema, strict)
        assert (raised.value.param, raised.value.details["pointer"]) == (FORM, row.refused)
        return
    grammar, left_out = as_form(compiler, row.schema, strict)
    assert left_out == {f"{FORM}.{name}" for name in row.left_out}
    for value in row.good:
        assert accepts(compiler, grammar, spelled(value)), value
    for value in row.bad:
        assert not accepts(compiler, grammar, spelled(value)), value


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("name", LISTED)
def test_an_argument_of_a_tool(compiler: GrammarCompiler, name: str, strict: bool, neighbour: str) -> None:
    """The same as in an answer, and the same beside other tools, whose names are their own."""
    row = ROWS[name]
    tools = (Tool("f", parameters=argument(row), strict=strict), *NEIGHBOURS[neighbour])
    at = "tools.0.function.parameters"
    if strict and row.refused is not None:
        with pytest.raises(InvalidParameter) as raised:
            as_tools(compiler, tools)
        assert (raised.value.param, raised.value.details["pointer"]) == (at, f"/properties/v{row.refused}")
        return
    grammar, left_out = as_tools(compiler, tools)
    beside = (
        {"tools.1.function.parameters.properties.x.uniqueItems"} if neighbour == "beside one that is not" else set()
    )
    honoured = isinstance(row.schema, dict) and row.schema.get("required") is True
    assert left_out == {f"{at}.properties.v.{one}" for one in row.left_out if not honoured} | beside
    for values, right in ((row.good, True), (row.bad, False)):
        for value in values:
            call = written(HERMES, [("f", {"v": "@"})]).replace('"@"', spelled(value))
            assert accepts(compiler, grammar, call) == right, call


@pytest.mark.parametrize("name", LISTED)
def test_a_loose_schema_is_never_refused_in_any_form_of_call(compiler: GrammarCompiler, name: str) -> None:
    """Without quotes and without delimiters, too; what a call may not hold is named."""
    for form in FORMATS:
        tools = (Tool("f", parameters=argument(ROWS[name])), STRICT_NEIGHBOUR)
        grammar, left_out = as_tools(compiler, tools, form)
        assert compiler.start(grammar)
        assert left_out >= {f"tools.0.function.parameters.properties.v.{one}" for one in ROWS[name].left_out}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("name", INVALID)
def test_what_is_no_schema_is_refused_everywhere(llm: LLM, name: str, strict: bool) -> None:
    """Also in a tool that no grammar would hold: what is refused does not depend on the tools beside it."""
    row = INVALID[name]
    with pytest.raises(InvalidParameter) as raised:
        llm.generate("x", constraint=Constraint("json", row.schema, strict, FORM), max_tokens=1)
    assert (raised.value.param, raised.value.details["pointer"]) == (FORM, row.invalid)
    for beside in NEIGHBOURS.values():
        tools = (Tool("f", parameters=argument(row), strict=strict), *beside)
        with pytest.raises(InvalidParameter) as raised:
            llm.generate([ChatMessage("user", "x")], tools=tools, max_tokens=1)
        assert raised.value.param == "tools.0.function.parameters"
        assert raised.value.details["pointer"] == f"/properties/v{row.invalid}"


NO_OBJECTS: dict[str, Any] = {
    "a text": {"type": "string"},
    "a list": {"type": "array"},
    "either of two others": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "a reference to a text": {"$ref": "#/$defs/s", "$defs": {"s": {"type": "string"}}},
    "an enum": {"enum": ["a"]},
    "true": True,
    "a list of schemas": [{}],
}
OBJECTS: dict[str, Any] = {
    "absent": None,
    "nothing said": {},
    "an object": {"type": "object"},
    "an object or null": {"type": ["object", "null"]},
    "members alone": {"properties": {"a": {"type": "string"}}},
    "either of two": {"anyOf": [members(("a",), a={}), members(("b",), b={})]},
    "a reference": {"$ref": "#/$defs/o", "$defs": {"o": members(a={})}},
    "no type": {"type": None, "properties": []},
}


@pytest.mark.parametrize("beside", NEIGHBOURS)
@pytest.mark.parametrize("name", [*NO_OBJECTS, *OBJECTS])
def test_the_parameters_of_a_tool_are_an_object(llm: LLM, name: str, beside: str) -> None:
    for choice in (ToolChoice(), REQUIRED):
        tools = (*NEIGHBOURS[beside], Tool("f", parameters=(NO_OBJECTS | OBJECTS)[name]))
        asked: dict[str, Any] = {"tools": tools, "tool_choice": choice, "max_tokens": 1}
        if name in OBJECTS:
            llm.generate([ChatMessage("user", "x")], **asked)
            continue
        with pytest.raises(InvalidParameter, match="object") as raised:
            llm.generate([ChatMessage("user", "x")], **asked)
        assert raised.value.param == f"tools.{len(tools) - 1}.function.parameters"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Circle(BaseModel):
    kind: Literal["circle"] = "circle"
    radius: int = Field(ge=1, le=9)


class Box(BaseModel):
    kind: Literal["box"] = "box"
    sides: tuple[bool, int] = (True, 1)


class Node(BaseModel):
    """A node."""

    shape: Circle | Box = Field(discriminator="kind")
    colour: Colour | None = None
    day: date | None
    children: list[Node] = Field(default=[], max_length=1)


def test_replies_are_what_pydantic_asked_for(llm: LLM) -> None:
    """The real thing: the schema that pydantic writes, a reply, and pydantic's own reading of it."""
    schema = Node.model_json_schema()
    answers = llm.generate("x", constraint=Constraint("json", schema), seed=1, n=8, max_tokens=700)
    whole = [answer for answer in answers if answer.finish_reason == "stop"]
    assert whole
    for answer in whole:
        TypeAdapter(Node).validate_json(answer.text)


GENERATED = [
    "discriminated union",
    "record by an enum",
    "tuple of zod 3",
    "nullable object",
    "a ring of two",
    "int32",
    "Enum by reference",
    "a schema used twice",
    "an anchor",
    "components",
]


@pytest.mark.parametrize("name", GENERATED)
def test_replies_satisfy_them(llm: LLM, name: str) -> None:
    row = ROWS[name]
    answers = llm.generate("x", constraint=Constraint("json", row.schema), seed=1, n=6, max_tokens=300)
    whole = [answer for answer in answers if answer.finish_reason == "stop"]
    assert whole
    for answer in whole:
        (row.oracle or Draft202012Validator)(row.schema).validate(json.loads(answer.text))


def test_what_is_left_out_is_told_of_a_prepared_request(llm: LLM) -> None:
    """The template is told the schemas as they came."""
    sloppy = {"type": "object", "properties": [], "required": None, "description": "words"}
    tools = (Tool("f", parameters=sloppy), Tool("g", parameters=members(a={"type": "array", "uniqueItems": True})))
    for choice, named in ((ToolChoice(), ()), (REQUIRED, ("tools.1.function.parameters.properties.a.uniqueItems",))):
        request = llm.engine.prepare(llm.request([ChatMessage("user", "x")], tools=tools, tool_choice=choice))
        at = "tools.0.function.parameters"
        assert request.left_out == (*named, f"{at}.properties", f"{at}.required")

"""Constrained replies: whatever the schema and the draws, what comes out is what was asked for, or it was refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jsonschema import Draft202012Validator

from engine import LLM, ChatMessage, Constraint, InvalidParameter, Tool
from engine.grammar.answer_grammar import answer_grammar
from engine.grammar.diagnosis import MAX_BYTES
from engine.text.schema_check import unenforced_errors

PROMPT = "say something"
POINT: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 99}, "name": {"enum": ["left", "right"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}

TOOL = Tool("f", "", {"type": "object", "properties": {}, "additionalProperties": False}, strict=True)


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=512)


def _leaves() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 200)).map(lambda t: (t[0], t[0] + t[1]))
    return st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "a b"}, {"enum": [1, "é", None, [2]]}]),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[1]}),
        bounds.map(lambda b: {"type": "number", "exclusiveMinimum": b[0], "maximum": b[1] + 1}),
        st.integers(0, 6).map(lambda n: {"type": "string", "minLength": n // 2, "maxLength": n}),
        st.sampled_from([r"^[a-c]{2,4}$", r"^\d{3}-x$", r"^(yes|no)$"]).map(lambda p: {"type": "string", "pattern": p}),
        st.sampled_from(["date", "time", "ipv4", "uuid"]).map(lambda f: {"type": "string", "format": f}),
    )


def _nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.lists(st.sampled_from(["a", "b", 'q"', "née"]), unique=True, max_size=3)
    objects = names.flatmap(
        lambda keys: st.tuples(
            st.tuples(*(inner for _ in keys)), st.sets(st.sampled_from(keys)) if keys else st.just(())
        ).map(
            lambda drawn: {
                "type": "object",
                "properties": dict(zip(keys, drawn[0], strict=True)),
                "required": sorted(drawn[1]),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.tuples(inner, st.integers(0, 2)).map(
        lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + 1}
    )
    return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}))


SCHEMAS = st.recursive(_leaves(), _nested, max_leaves=5)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**31))
def test_every_finished_reply_satisfies_its_schema(llm: LLM, schema: dict[str, Any], seed: int) -> None:
    answers = llm.generate(PROMPT, constraint=Constraint("json", schema), seed=seed, n=3, max_tokens=160)
    for answer in answers:
        if answer.finish_reason == "stop":
            value = json.loads(answer.text)
            assert Draft202012Validator(schema).is_valid(value), (schema, answer.text)


def test_recursion_and_references(llm: LLM) -> None:
    leaf = {
        "type": "object",
        "properties": {"v": {"type": "boolean"}},
        "required": ["v"],
        "additionalProperties": False,
    }
    tree = {"$defs": {"t": {"anyOf": [leaf, {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}]}}}
    schema = {**tree, "$ref": "#/$defs/t"}
    answers = llm.generate(PROMPT, constraint=Constraint("json", schema), seed=1, n=8, max_tokens=300)
    whole = [a for a in answers if a.finish_reason == "stop"]
    assert whole
    for answer in whole:
        Draft202012Validator(schema).validate(json.loads(answer.text))


def test_a_reply_that_the_limit_cuts_is_the_beginning_of_the_whole_one(llm: LLM) -> None:
    constraint = Constraint("json", POINT)
    [whole] = llm.generate(PROMPT, constraint=constraint, seed=3, max_tokens=200)
    assert whole.finish_reason == "stop"
    for limit in {*range(1, len(whole.token_ids), 5), len(whole.token_ids) - 1}:
        [cut] = llm.generate(PROMPT, constraint=constraint, seed=3, max_tokens=limit)
        assert (cut.finish_reason, cut.token_ids) == ("length", whole.token_ids[:limit])
        assert whole.text.startswith(cut.text)


def test_skipping_ahead_changes_nothing(llm: LLM) -> None:
    """Forced tokens are appended without a step; with logprobs each has its own step, and the reply is the same."""
    constraint = Constraint("json", POINT)
    for seed in range(6):
        [fast] = llm.generate(PROMPT, constraint=constraint, seed=seed)
        [slow] = llm.generate(PROMPT, constraint=constraint, seed=seed, logprobs=True, top_logprobs=2)
        assert fast.token_ids == slow.token_ids
        assert [entry.token_id for entry in slow.logprobs or ()] == list(slow.token_ids)
    outputs = list(llm.stream(PROMPT, constraint=constraint, seed=0))
    steps = [len(d.token_ids) for o in outputs for d in o.deltas]
    assert max(steps) > 1, "nothing was skipped"
    assert len(steps) < sum(steps)


def test_neighbours_and_choices_change_nothing(llm: LLM) -> None:
    constraint = Constraint("json", POINT)
    [alone] = llm.generate(PROMPT, constraint=constraint, seed=5)
    [free] = llm.generate(PROMPT, seed=5, max_tokens=30)
    several = llm.generate(PROMPT, constraint=constraint, seed=5, n=4)
    assert several[0].token_ids == alone.token_ids
    assert len({c.text for c in several}) > 1
    first = llm.stream(PROMPT, constraint=constraint, seed=5)
    opening = next(first)
    [beside] = llm.generate(PROMPT, seed=5, max_tokens=30)
    rest = list(first)
    assert beside.token_ids == free.token_ids
    tokens = [t for o in [opening, *rest] for d in o.deltas for t in d.token_ids]
    assert tuple(tokens) == alone.token_ids


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"ignore_eos": True}, {"min_tokens": 500}, {"top_k": 1}])
def test_a_grammar_that_allows_only_the_end_ends_with_stop(llm: LLM, sampling: dict[str, Any]) -> None:
    [answer] = llm.generate(PROMPT, constraint=Constraint("choice", ["red apple", "rot"]), seed=2, **sampling)
    assert answer.finish_reason == "stop"
    assert answer.text in ("red apple", "rot")


def test_white_space_is_bounded(llm: LLM) -> None:
    blanks = {
        i: 50.0
        for i in range(len(llm.engine.model.tokenizer))
        if not llm.engine.model.vocabulary.token_bytes(i).strip()
    }
    [answer] = llm.generate(PROMPT, constraint=Constraint("json", POINT), logit_bias=blanks, seed=1, max_tokens=300)
    assert answer.finish_reason == "stop"
    assert len(answer.text) < 200
    Draft202012Validator(POINT).validate(json.loads(answer.text))


def test_a_bias_that_leaves_nothing_is_named(llm: LLM) -> None:
    bias = dict.fromkeys(range(len(llm.engine.model.tokenizer)), -100)
    with pytest.raises(InvalidParameter) as raised:
        llm.generate(PROMPT, constraint=Constraint("choice", ["a"]), logit_bias=bias)
    assert raised.value.code == "no_token_left"


@pytest.mark.parametrize("pattern", [r"[a-f]{4}", r"\d+(\.\d{2})?", r"(ab|cd)*x"])
def test_expressions(llm: LLM, pattern: str) -> None:
    for answer in llm.generate(PROMPT, constraint=Constraint("regex", pattern), seed=1, n=3, max_tokens=60):
        assert answer.finish_reason == "length" or re.fullmatch(pattern, answer.text)


def test_a_lark_grammar(llm: LLM) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[0-9]{1,3}/'
    [answer] = llm.generate(PROMPT, constraint=Constraint("grammar", grammar), seed=1)
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3}){1,3}", answer.text)


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "/properties/a/uniqueItems"),
        ({"$defs": {"u": {"not": {}}}, "type": "array", "items": {"$ref": "#/$defs/u"}}, "/$defs/u/not"),
        ({"properties": {"a/b~": {"type": "nothing"}}}, "/properties/a~1b~0/type"),
        ({"anyOf": [{"type": "string"}, {"type": "string", "format": "colour"}]}, "/anyOf/1/format"),
        ({"properties": {"p": {"type": "string", "pattern": "(a"}}}, "/properties/p/pattern"),
        ({"properties": {"p": {"type": "string", "pattern": "a(?=b)"}}}, "/properties/p/pattern"),
        ({"properties": {"p": {"$ref": "#/$defs/gone"}}}, "/properties/p/$ref"),
        ({"$ref": "http://example.com/schema"}, "/$ref"),
        (
            {"type": "object", "properties": {"n": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["n"]},
            "/properties/n/minimum",
        ),
        ({"properties": {"s": {"type": "string", "minLength": -1}}}, "/properties/s/minLength"),
    ],
)
def test_strict_refuses_what_it_cannot_enforce_and_says_where(llm: LLM, schema: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidParameter) as raised:
        llm.generate(PROMPT, constraint=Constraint("json", schema, param="here"))
    assert raised.value.details["pointer"] == pointer
    assert raised.value.param == "here"
    assert pointer in raised.value.message


@pytest.mark.parametrize(
    "schema",
    [
        _deep(10_000),
        {"enum": ["x" * (MAX_BYTES + 1)]},
        {"properties": {f"p{i}": {"type": "string"} for i in range(40_000)}},
        {"type": "string", "pattern": "(" * 5000 + "a" + ")" * 5000},
        False,
        [1],
    ],
    ids=["deep", "long", "wide", "nested groups", "nothing", "list"],
)
def test_monstrous_schemas_are_refused_soon(llm: LLM, schema: Any) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidParameter) as raised:
        llm.generate(PROMPT, constraint=Constraint("json", schema), max_tokens=4)
    assert len(raised.value.message) < 1000
    assert time.monotonic() - started < 20  # not a benchmark: it must not hang


@pytest.mark.parametrize(
    "schema",
    [{"not": 5}, {"dependentRequired": {"a": 5}}, {"uniqueItems": True, "minItems": "a"}, {"if": [1]}],
)
def test_what_is_no_schema_is_refused_without_strict_too(llm: LLM, schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        llm.generate(PROMPT, constraint=Constraint("json", schema, strict=False), max_tokens=4)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "^(.*a){12}$", "(x+x+)+y", "^(([a-z]{1,500}){1,500}){1,500}$"]
)
def test_catastrophic_expressions_are_harmless(llm: LLM, pattern: str) -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string", "pattern": pattern}}, "required": ["s"]}
    try:
        [answer] = llm.generate(PROMPT, constraint=Constraint("json", schema), seed=1, max_tokens=40)
    except InvalidParameter:
        return
    assert answer.finish_reason in ("stop", "length")


def test_without_strict_the_rest_is_checked_afterwards(llm: LLM) -> None:
    items = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3, "uniqueItems": True}
    with pytest.raises(InvalidParameter):
        llm.generate(PROMPT, constraint=Constraint("json", items))
    *_, last = llm.stream(PROMPT, constraint=Constraint("json", items, strict=False), seed=1)
    assert "unique" in (last.deltas[0].schema_error or "")
    possible = {**items, "items": {"enum": list(range(50))}}
    outcomes = set()
    for seed in range(12):
        *parts, last = llm.stream(PROMPT, constraint=Constraint("json", possible, strict=False), seed=seed)
        text = "".join(d.text for o in [*parts, last] for d in o.deltas)
        values = json.loads(text)
        assert len(values) == 3, "what can be enforced is"
        assert (last.deltas[0].schema_error == "") == (len(set(values)) == 3)
        outcomes.add(last.deltas[0].schema_error == "")
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("text", "schema", "valid"),
    [
        ("[1, 1]", {"uniqueItems": True}, False),
        ("[1, 2]", {"uniqueItems": True}, True),
        ("[1", {"uniqueItems": True}, False),
        ('"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"', {"pattern": "^(a+)+$", "not": {"type": "null"}}, True),
        ("1", {"not": {"type": "integer"}}, False),
        ("1", {"$ref": "http://example.com/schema"}, False),
        ("1", {"not": 5}, False),  # never reached by a request; still no fault of the engine
        ("[1, 1.0]", {"uniqueItems": True}, False),
        ('[1, true, "1", [1], [true], {"a": 1}]', {"uniqueItems": True}, True),
        ("1", {"$ref": "#"}, False),  # for ever
        ('{"b": 1}', {"patternProperties": {"(a+)+$": {}}, "additionalProperties": False, "minProperties": 1}, True),
    ],
)
def test_the_check_afterwards(text: str, schema: dict[str, Any], valid: bool) -> None:
    assert (unenforced_errors(text, schema) is None) == valid


def test_the_check_afterwards_is_bounded() -> None:
    """Nested references double with each level; whoever asks for that is told, and nobody waits."""

    def doubling(levels: int) -> dict[str, Any]:
        names = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
        return {"$defs": {**names, f"d{levels}": {}}, "$ref": "#/$defs/d0"}

    assert unenforced_errors("{}", doubling(4)) is None
    assert "more than 20,000 keywords" in (unenforced_errors("{}", doubling(40)) or "")
    assert "more than 100 keywords" in (unenforced_errors("{}", doubling(60)) or "")
    many = json.dumps([{"a": [i]} for i in range(10_000)])
    assert unenforced_errors(many, {"uniqueItems": True}) is None
    assert "keywords" in (unenforced_errors(many, {"allOf": [{"uniqueItems": True}] * 500}) or "")
    assert "keywords" in (unenforced_errors(json.dumps([999] * 3000), {"items": {"enum": [*range(1000)]}}) or "")


RINGS: list[dict[str, Any]] = [
    {"not": {"$ref": "#"}},
    {"not": {"not": {"$ref": "#"}}},
    {"allOf": [{"$ref": "#"}]},
    {"oneOf": [{"$ref": "#"}, True]},
    {"if": {"$ref": "#"}, "then": True},
    {"$defs": {"a": {"not": {"not": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"},
    {"dependentSchemas": {"a": {"$ref": "#"}}},
    {"propertyNames": {"not": {"$ref": "#/propertyNames"}}},
    {"allOf": [{"$ref": "#"}], "unevaluatedProperties": {"$ref": "#"}},
]


@pytest.mark.parametrize("schema", RINGS, ids=lambda schema: json.dumps(schema)[:40])
def test_a_ring_of_references_is_told_the_same_on_every_stack(schema: dict[str, Any]) -> None:
    """Not by Python's limit, which counts the caller's frames, and which the library turns into a panic of Rust's."""

    def asked_at(depth: int) -> str | None:
        return asked_at(depth - 1) if depth else unenforced_errors('{"a": {"a": 1}}', schema)

    told = {asked_at(depth) for depth in range(0, 400, 13)}
    assert len(told) == 1
    assert "one inside the other" in (told.pop() or "")


def test_a_text_is_checked_to_a_hundred_levels() -> None:
    tree: dict[str, Any] = {"properties": {"a": {"type": "array", "items": {"$ref": "#"}}}, "required": ["a"]}
    good = '{"a": [' * 20 + '{"a": []}' + "]}" * 20
    assert unenforced_errors(good, tree) is None
    assert unenforced_errors(good.replace('{"a": []}', "{}"), tree)
    assert "100 levels" in (unenforced_errors("[" * 100_000 + "]" * 100_000, tree) or "")


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (Constraint("choice", ["x<|im_end|>y"]), "x<|im_end|>y"),
        (Constraint("choice", ["<|im_end|>"]), "<|im_end|>"),
        (Constraint("json", {"const": "a<|im_end|>b"}), '"a<|im_end|>b"'),
        (Constraint("regex", r"a<\|im_start\|>b"), "a<|im_start|>b"),
    ],
)
def test_the_name_of_a_special_token_is_text(llm: LLM, constraint: Constraint, text: str) -> None:
    """Forced text that spells an end token is neither that token nor the end."""
    for logprobs in (False, True):
        [answer] = llm.generate(PROMPT, constraint=constraint, seed=1, logprobs=logprobs, max_tokens=60)
        assert (answer.text, answer.finish_reason) == (text, "stop")
        assert not set(answer.token_ids) & set(llm.engine.model.end_ids)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"constraint": Constraint("regex", "a+b", param="guided_regex")}, "guided_regex"),
        ({"constraint": Constraint("json", POINT)}, "response_format"),
        ({"tools": (TOOL,)}, "tools"),
        ({"tools": (TOOL,), "constraint": Constraint("json", POINT, param="guided_json")}, "tools"),
    ],
)
def test_a_grammar_that_fails_names_the_field_that_asked_for_it(llm: LLM, fields: dict[str, Any], param: str) -> None:
    """Whatever the grammar library says of it, and however late."""
    prepared = llm.engine.prepare(llm.request([ChatMessage("user", "say")], **fields))
    assert prepared.grammar is not None
    with pytest.raises(InvalidParameter) as early:
        llm.engine.model.grammars.start("start: (", prepared.grammar_param)
    llm.engine.add(prepared)
    state = llm.engine._requests[prepared.request_id].choices[0].grammar
    assert state is not None
    with pytest.raises(InvalidParameter) as late:
        state.consume(llm.engine.model.vocabulary.size)  # no token at all
    assert (early.value.param, late.value.param) == (param, param)
    llm.engine.abort(prepared.request_id)


@pytest.mark.parametrize(
    ("param", "advice"),
    [
        ("response_format.json_schema.schema", "With strict: false what can be enforced is"),
        ("text.format.schema", "With strict: false what can be enforced is"),
        ("guided_json", "In response_format, with strict: false, what can be enforced is"),
        ("structured_outputs.json", "In response_format, with strict: false, what can be enforced is"),
        ("output_config.format.schema", ""),
    ],
)
def test_a_refusal_advises_only_what_can_be_sent(llm: LLM, param: str, advice: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        answer_grammar(llm.engine.model.grammars, Constraint("json", {"uniqueItems": True}, param=param))
    assert refused.value.message.startswith(f"{param}: at /uniqueItems")
    assert (advice in refused.value.message) if advice else ("strict" not in refused.value.message)


HALVES = [
    Constraint("choice", ["yes", "n\ud800"], param="guided"),
    Constraint("regex", "a\ud800", param="guided"),
    Constraint("grammar", 'start: "\udfff"', param="guided"),
    Constraint("gbnf", 'root ::= "\ud800"', param="guided"),
    Constraint("json", {"properties": {"\ud800": {"type": "null"}}}, param="guided"),
    Constraint("json", {"enum": ["\ud800"]}, False, param="guided"),
]


@pytest.mark.parametrize("constraint", HALVES, ids=lambda form: form.kind)
@pytest.mark.parametrize("tools", [(), (TOOL,)], ids=["alone", "beside tools"])
def test_half_a_surrogate_pair_is_refused_by_name(llm: LLM, constraint: Constraint, tools: tuple[Tool, ...]) -> None:
    with pytest.raises(InvalidParameter, match="guided") as refused:
        llm.engine.prepare(llm.request([ChatMessage("user", "say")], constraint=constraint, tools=tools))
    assert refused.value.param == "guided"
    assert "half a surrogate pair" in refused.value.message or "combined with tools" in refused.value.message


LONG: list[tuple[str, Constraint]] = [
    ("at the beginning", Constraint("json", {"const": " xyz" * 2000})),
    ("after a free part", Constraint("grammar", 'start: /[ab]/ "' + " xyz" * 2000 + '"')),
]


@pytest.mark.parametrize("constraint", [form for _, form in LONG], ids=[name for name, _ in LONG])
def test_a_long_text_is_spelled_once_for_all_choices(
    llm: LLM, constraint: Constraint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a reply begins with it, that is before the engine's thread has the request: neighbours do not wait."""
    speller, spelled = llm.engine.model.grammars._speller, []
    encode = speller._encode
    assert encode is not None

    def counted(text: str) -> list[int]:
        if len(text) > 1000:
            spelled.append(text)
        return encode(text)

    monkeypatch.setattr(speller, "_encode", counted)
    request = llm.request([ChatMessage("user", "say")], constraint=constraint, n=8, max_tokens=3)
    prepared = llm.engine.prepare(request)
    begun = len(spelled)
    llm.engine.add(prepared)
    states = [choice.grammar for choice in llm.engine._requests[prepared.request_id].choices]
    assert begun == (constraint.kind == "json")
    assert len(spelled) == begun
    letter = llm.engine.model.grammars.spell("a") or []
    for state in states:
        assert state is not None
        if constraint.kind == "grammar":
            state.consume(letter[0])
        assert len(state.all_forced) > 1000
    assert len(spelled) == 1
    llm.engine.abort(prepared.request_id)


def test_finding_a_fault_is_bounded(llm: LLM) -> None:
    parts: dict[str, Any] = {f"p{i}": {"type": "string", "format": "fo-o"} for i in range(60)}
    parts |= {f"q{i}": {"enum": [f"{'v' * 25}{j}" for j in range(20)]} for i in range(200)}
    schema = {"type": "object", "properties": parts}
    with pytest.raises(InvalidParameter, match="format") as raised:
        answer_grammar(llm.engine.model.grammars, Constraint("json", schema, strict=True))
    assert raised.value.details["pointer"] == "/properties/p0/format"
    dropped = answer_grammar(llm.engine.model.grammars, Constraint("json", schema, strict=False)).unenforced
    assert dropped == tuple(f"/properties/p{i}/format" for i in range(60))
    for i in range(70):
        parts[f"p{i}"] = {"type": "string", "pattern": f"(?={i})"}
    dropped = answer_grammar(llm.engine.model.grammars, Constraint("json", schema, strict=False)).unenforced
    assert dropped == tuple(f"/properties/p{i}/pattern" for i in range(70))

"""Tool calls under a grammar: whatever it allows is read as a call of a tool, with arguments that are valid."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from jsonschema import Draft202012Validator
from tool_forms import BARE, CLOSE, FORMATS, HERMES, KEYED, XML, read, written

from engine import LLM, ChatMessage, Constraint, InvalidParameter, Tool, ToolChoice
from engine.grammar.answer_grammar import ReplyGrammar
from engine.grammar.tool_grammar import tool_grammar
from engine.replies.reasoning import ReasoningFormat
from engine.replies.tool_format import ToolFormat

HELLO = [ChatMessage("user", "Hello")]
THOUGHTS = ReasoningFormat("<think>", "</think>", "\n</think>\n\n")
CHANNELS = ReasoningFormat("<c>analysis<m>", "<e>", "<e><s>", "<c>final<m>", "<s>", ("<c>commentary<m>",))
REQUIRED = ToolChoice("required")
PING = ToolChoice("function", "ping")
CHANNEL_CALL = ToolFormat("json", "", "<c>commentary to=functions.", " json<m>", "", None, "")


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=1024)


def strict(name: str = "f", **parameters: Any) -> Tool:
    return Tool(name, parameters=parameters, strict=True)


def with_value(part: Any, **more: Any) -> Tool:
    """A tool with one argument of this schema."""
    members = {"type": "object", "properties": {"a": part}, "required": ["a"], "additionalProperties": False}
    return strict(**members, **more)


def grammar_of(llm: LLM, found: ToolFormat, tools: list[Any], *thoughts: Any, **how: Any) -> ReplyGrammar:
    made = tool_grammar(llm.engine.model.grammars, found, tools, *thoughts, **{"free": False, "several": False, **how})
    llm.engine.model.grammars.check(made.text, "tools")
    return made


def accepts(llm: LLM, grammar: str, text: str) -> bool:
    """Whether a text, in the tokenizer's own spelling, is one that the grammar allows."""
    compiler = llm.engine.model.grammars
    state = compiler.start(grammar)
    for token in llm.engine.model.tokenizer(text, add_special_tokens=False)["input_ids"]:
        if state.stopped or not compiler.allowed(state)[token]:
            return False
        state.consume(token)
    return state.accepting


STRICT = [
    strict(
        "get_weather",
        type="object",
        properties={
            "city": {"type": "string", "enum": ["Oslo", "Rio"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "deep": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        required=["city", "days"],
        additionalProperties=False,
    ),
    strict("ping", type="object", properties={}, additionalProperties=False),
]
SCHEMAS: dict[str, Any] = {tool.name: tool.parameters for tool in STRICT}


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(
    "parameters", [{"properties": [1]}, {"properties": {"a": True}, "required": 3}, {"properties": {"a": {"type": 7}}}]
)
def test_hostile_definitions_are_refused(llm: LLM, choice: Any, parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter) as raised:
        llm.generate(HELLO, tools=[Tool("f", parameters=parameters)], tool_choice=ToolChoice(choice), max_tokens=1)
    assert raised.value.param == "tools.0.function.parameters"
    assert raised.value.details["pointer"] in ("/properties", "/required", "/properties/a/type")


def walk(llm: LLM, grammar: str, rng: random.Random, limit: int = 3000) -> str | None:
    """A text of a grammar, token by token by chance; None if it has not ended by then."""
    compiler, words = llm.engine.model.grammars, llm.engine.model.vocabulary
    state, data = compiler.start(grammar), b""
    for _ in range(limit):
        if state.stopped or (state.accepting and rng.random() < 0.3):
            return data.decode()
        allowed = compiler.allowed(state).nonzero()[0].tolist()
        token = rng.choice([i for i in allowed if i not in llm.engine.model.end_ids])
        state.consume(token)
        data += words.token_bytes(token)
    return None


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_satisfy_their_schemas(llm: LLM, name: str) -> None:
    found = FORMATS[name]
    several = found.between is not None
    grammar = grammar_of(llm, found, STRICT, several=several).text
    counts = set()
    for seed in range(12):
        text = walk(llm, grammar, random.Random(seed))
        assert text is not None
        said, calls = read(found, [text], STRICT)
        assert said.strip() == "", (text, said)
        for called, arguments in calls:
            Draft202012Validator(SCHEMAS[called]).validate(arguments)
        counts.add(len(calls))
    assert (max(counts) > 1) == several


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "bare"])
def test_a_strict_call_is_held_to_its_schema_once_it_begins(llm: LLM, name: str) -> None:
    found = FORMATS[name]
    grammar = grammar_of(llm, found, STRICT, free=True, several=True).text
    good = f"Let me <see> [it].\n{written(found, [('get_weather', {'city': 'Oslo', 'days': 3})])}"
    for text, accepted in (
        ("Just text, {no} call. <", True),
        (good, True),
        (good.replace("Oslo", "Rome"), False),
        (good.replace("get_weather", "format_disk"), False),
    ):
        assert accepts(llm, grammar, text) == accepted, text


@pytest.mark.parametrize("choice", [REQUIRED, PING, ToolChoice("function", "get_weather")])
def test_a_choice_is_enforced(llm: LLM, choice: ToolChoice) -> None:
    for seed in range(4):
        [answer] = llm.generate(HELLO, tools=STRICT, tool_choice=choice, seed=seed, max_tokens=400)
        assert answer.finish_reason in ("tool_calls", "length")
        for call in answer.tool_calls:
            assert choice.name in (None, call.name)
            Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))
        if answer.finish_reason == "tool_calls":
            assert answer.text == ""
            assert choice.name is None or len(answer.tool_calls) == 1


@pytest.mark.slow
def test_a_form_holds_what_is_no_call(llm: LLM) -> None:
    """With tools and a form, a reply is calls that satisfy their schemas, or an answer that satisfies its own."""
    form = Constraint("json", {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                               "additionalProperties": False})  # fmt: skip
    kinds = set()
    for seed in range(12):
        bias = {llm_token(llm, "{<"[seed % 2]): 5.0}
        [answer] = llm.generate(HELLO, tools=STRICT, constraint=form, seed=seed, max_tokens=400, logit_bias=bias)
        kinds.add(answer.finish_reason)
        if answer.finish_reason == "stop":
            assert json.loads(answer.text)["a"] in (1, 2)
        if answer.finish_reason == "tool_calls":
            assert answer.text == ""
        for call in answer.tool_calls:
            Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))
    assert {"stop", "tool_calls"} <= kinds
    [answer] = llm.generate(HELLO, tools=STRICT, constraint=form, tool_choice=PING, seed=1, max_tokens=100)
    assert [call.name for call in answer.tool_calls] == ["ping"]
    with pytest.raises(InvalidParameter, match="whole grammar"):
        llm.generate(HELLO, tools=STRICT, constraint=Constraint("grammar", 'start: "a"'), max_tokens=3)


def llm_token(llm: LLM, text: str) -> int:
    [token] = llm.engine.model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(token)


def test_a_strict_schema_that_cannot_be_enforced_is_refused(llm: LLM) -> None:
    tool = Tool("f", parameters={"properties": {"a": {"type": "array", "uniqueItems": True}}})
    llm.generate(HELLO, tools=[tool], tool_choice=REQUIRED, max_tokens=3)
    with pytest.raises(InvalidParameter) as raised:
        llm.generate(HELLO, tools=[replace(tool, strict=True)], max_tokens=3)
    assert raised.value.param == "tools.0.function.parameters"
    assert raised.value.details["pointer"] == "/properties/a/uniqueItems"


# -- forms that write arguments one by one -----------------------------------------------------------------------------

PAIRS = {"xml": XML, "keyed": KEYED}


def satisfied(llm: LLM, found: ToolFormat, tool: Tool, seeds: int = 6, limit: int = 600) -> int:
    """Walk the grammar of a tool: what ends is read as one valid call of it. How many ended."""
    grammar, schema, ended = grammar_of(llm, found, [tool]).text, tool.parameters, 0
    for seed in range(seeds):
        text = walk(llm, grammar, random.Random(seed), limit)
        if text is None:
            continue
        said, calls = read(found, [text], [tool])
        assert (said, len(calls)) == ("", 1), text
        Draft202012Validator(schema or {}).validate(calls[0][1])
        ended += 1
    return ended


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize(
    "part",
    [
        {"type": "string", "pattern": "^[a-c/]{2}$"},
        {"type": "string", "const": " x "},
        {"type": "string", "maxLength": 3},
        {"type": "string", "minLength": 2, "maxLength": 9, "pattern": "^[a-z]+$"},
        {"enum": ["1", "true", "", " x ", "y\n"]},
        {"enum": ["x", 1, None, {"b": [2]}]},
        {"type": "string", "enum": ["x", 1]},
        {"type": "string", "enum": ["long", "x"], "maxLength": 2},
        {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
        {"anyOf": [{"type": "string", "pattern": "^[a-z]{2}$"}, {"type": "integer"}]},
        {"type": ["string", "boolean"], "maxLength": 5},
        {"allOf": [{"$ref": "#/$defs/word"}], "default": "x"},
        {"$ref": "#/$defs/word"},
        {"type": "object", "properties": {"t": {"enum": ["x</parameter>y</arg_value></tool_call>"]}}, "required": ["t"],
         "additionalProperties": False},
        {"type": "array", "items": {"$ref": "#/properties/n"}, "maxItems": 2},
        {"type": "integer", "minimum": -3},
    ],
)  # fmt: skip
def test_values_without_quotes_are_held_to_their_schema(llm: LLM, form: str, part: dict[str, Any]) -> None:
    definitions = {"word": {"type": "string", "enum": ["1", "x y"]}}
    parameters: Any = with_value(part).parameters
    parameters["properties"]["n"] = {"enum": [7, 8]}
    assert satisfied(llm, PAIRS[form], strict(**parameters, **{"$defs": definitions})) >= 4


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize("key", ["a>b", " a ", "a\n", 'q"', "<|im_end|>", "", "</arg_key>"])
def test_a_key_is_what_it_is_called(llm: LLM, form: str, key: str) -> None:
    tool = strict(type="object", properties={key: {"enum": ["x", "y"]}}, required=[key], additionalProperties=False)
    assert satisfied(llm, PAIRS[form], tool) >= 4


@pytest.mark.parametrize("form", PAIRS)
def test_a_schema_may_be_elsewhere(llm: LLM, form: str) -> None:
    inner = with_value({"enum": ["x"]}).parameters
    assert satisfied(llm, PAIRS[form], strict(**{"$ref": "#/$defs/A", "$defs": {"A": inner}})) >= 4
    tree = {"type": "object", "properties": {"v": {"enum": [1]}, "next": {"type": "array", "maxItems": 1,
            "items": {"$ref": "#"}}}, "required": ["v"], "additionalProperties": False}  # fmt: skip
    assert satisfied(llm, PAIRS[form], strict(**tree)) >= 3


def test_texts_without_quotes_hold_no_end_of_their_value(llm: LLM) -> None:
    grammar = grammar_of(llm, XML, [with_value({"type": "string"})]).text
    for value, allowed in (("a < b\n\n", True), ("a</parameter>b", False), ("a</tool_call>b", False), ("", True)):
        assert accepts(llm, grammar, written(XML, [("f", {"a": value})])) == allowed, value


@pytest.mark.parametrize(
    ("parameters", "pointer"),
    [
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "/properties/a/format"),
        ({"properties": {"a": {"type": "string", "pattern": "a$|^b"}}}, "/properties/a/pattern"),
        ({"properties": {"a/b": {"enum": ["x</tool_call>"]}}}, "/properties/a~1b/enum"),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 3}]}}},
         "/properties/a/minimum"),
        ({"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, "/anyOf"),
        ({"properties": {"a": False}, "required": ["a"]}, "/properties/a"),
        ({"required": ["z"], "additionalProperties": False}, "/required"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_without_quotes_is_refused(llm: LLM, parameters: dict[str, Any], pointer: str) -> None:
    tool = strict(type="object", **parameters)
    with pytest.raises(InvalidParameter) as raised:
        grammar_of(llm, XML, [tool])
    assert raised.value.details["pointer"] == pointer
    loose = grammar_of(llm, XML, [replace(tool, strict=False)])
    assert loose.unenforced_tools == {"f"}
    assert f"tools.0.function.parameters{pointer.replace('/', '.').replace('~1', '/')}" in loose.left_out


def test_what_a_schema_shares_is_compiled_once(llm: LLM) -> None:
    shared = {"type": "object", "properties": {f"k{i}": {"enum": ["x" * 50, i]} for i in range(50)}}
    parts = {f"p{i}": {"$ref": "#/$defs/shared"} for i in range(100)}
    made = grammar_of(llm, XML, [strict(type="object", properties=parts, **{"$defs": {"shared": shared}})])
    assert len(made.text) < 200_000


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize(
    "part",
    [
        {"type": ["string", "null"], "enum": ["a" * 40 + "!", None], "pattern": "^(a+)+$"},
        {"type": "string", "enum": ["abc"], "pattern": "^\\p{L}+$"},
        {"$ref": "#/properties/a"},
        {"anyOf": [{"$ref": "#/properties/a"}]},
        {"type": "string", "pattern": "^<b>", "maxLength": 10},
        {"type": "string", "pattern": "</parameter></arg_value>"},
        {"type": "string", "pattern": "^a+$", "maxLength": 0},
        {"type": "string", "enum": ["a"], "minLength": 2},
    ],
)
def test_what_nothing_can_satisfy_or_nobody_can_check_is_refused(llm: LLM, form: str, part: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        grammar_of(llm, PAIRS[form], [with_value(part)])


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize(
    ("part", "value", "expected"),
    [
        ({"anyOf": [{"type": "string"}, {"const": 0}]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"const": 0}]}, "0", 0),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"enum": [1234, True]}]}, "5", "5"),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"enum": [1234, True]}]}, "true", True),
    ],
)
def test_a_value_is_no_text_only_where_that_very_value_is_allowed(
    llm: LLM, form: str, part: dict[str, Any], value: str, expected: Any
) -> None:
    found, tool = PAIRS[form], with_value(part)
    text = written(found, [("f", {"a": value})])
    assert accepts(llm, grammar_of(llm, found, [tool]).text, text)
    assert read(found, [text], [tool], exact_calls=True)[1] == [("f", {"a": expected})]


def test_an_optional_argument_that_nothing_satisfies_is_left_out(llm: LLM) -> None:
    tool = strict(type="object", properties={"a": {"type": "string", "enum": ["x"], "minLength": 2}})
    grammar = grammar_of(llm, XML, [tool]).text
    assert accepts(llm, grammar, written(XML, [("f", {})]))
    assert not accepts(llm, grammar, written(XML, [("f", {"a": "5"})]))


def test_an_expression_that_is_none_is_said_of_the_tools(llm: LLM) -> None:
    with pytest.raises(InvalidParameter) as raised:
        grammar_of(llm, XML, [with_value({"type": "string", "pattern": "^(?=a)"})])
    assert (raised.value.param or "").startswith("tools")


def test_large_schemas_are_refused_in_time(llm: LLM) -> None:
    big = {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(1000)}}
    many = {f"p{i}": {"$ref": "#/$defs/b", "minProperties": i} for i in range(60)}
    with pytest.raises(InvalidParameter):
        grammar_of(llm, XML, [strict(type="object", properties=many, **{"$defs": {"b": big}})])
    with pytest.raises(InvalidParameter, match="262144"):
        grammar_of(llm, HERMES, [with_value({"enum": ["x" * 1000 + str(i) for i in range(300)]})])


# -- text with calls in it ---------------------------------------------------------------------------------------------

CITY = strict("get_weather", type="object", properties={"city": {"enum": ["Oslo"]}}, required=["city"],
              additionalProperties=False)  # fmt: skip
GOOD = ("get_weather", {"city": "Oslo"})
BAD = ("get_weather", {"city": "Rome"})


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (f"<think>The tag <tool_call> begins one.</think>\n\nHello {written(HERMES, [GOOD])}", True),
        ("<think>The tag <tool_call> begins one.</think>\n\nHello", True),
        ("Hello <think>", True),
        (f"Hello <think> {written(HERMES, [BAD])}", False),
        (f"<think>hm</think> {written(HERMES, [BAD])}", False),
        (f"<think>{written(HERMES, [BAD])}</think> {written(HERMES, [GOOD])}", True),
    ],
)
def test_a_delimiter_in_the_thoughts_begins_no_call(llm: LLM, text: str, allowed: bool) -> None:
    assert accepts(llm, grammar_of(llm, HERMES, [CITY], THOUGHTS, False, free=True).text, text) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("<c>analysis<m>hm<e><s><c>final<m>Hello", True),
        ("<c>final<m>Hello", True),
        (f"<c>analysis<m>a<e><s><c>commentary<m>Look.<e><s><c>analysis<m>b<e><s>{written(CHANNEL_CALL, [GOOD])}", True),
        (written(CHANNEL_CALL, [GOOD]), True),
        (written(CHANNEL_CALL, [BAD]), False),
        ("Hello", False),
    ],
)  # fmt: skip
def test_in_channels_an_answer_or_a_call(llm: LLM, text: str, allowed: bool) -> None:
    assert accepts(llm, grammar_of(llm, CHANNEL_CALL, [CITY], CHANNELS, False, free=True).text, text) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (written(BARE, [GOOD]), True),
        (written(BARE, [BAD]), False),
        (written(BARE, [BAD]).replace('{"name": ', '{ "name" :'), False),
        ('{"a": 1}', True),
        (f"Such as {written(BARE, [BAD])}", True),
        ('Example: {"name": "Bob"} is JSON.', True),
    ],
)
def test_a_call_without_a_delimiter_is_all_of_a_reply(llm: LLM, text: str, allowed: bool) -> None:
    grammar = grammar_of(llm, BARE, [CITY], free=True).text
    assert accepts(llm, grammar, text) == allowed
    if allowed and text != written(BARE, [GOOD]):
        assert read(BARE, list(text), [CITY], exact_calls=True) == (text, [])


def test_a_form_that_looks_like_a_call(llm: LLM) -> None:
    person = {"type": "object", "properties": {"name": {"$ref": "#/$defs/n"}}, "required": ["name"],
              "additionalProperties": False, "$defs": {"n": {"type": "string"}}}  # fmt: skip
    grammar = grammar_of(llm, BARE, [CITY], otherwise=Constraint("json", person)).text
    for text, allowed in (
        ('{"name": "Bob"}', True), ('{"name":"get_weather"}', True), (written(BARE, [GOOD]), True),
        (written(BARE, [BAD]), False), ('{"name": "Bob", "parameters": {}}', False),
    ):  # fmt: skip
        assert accepts(llm, grammar, text) == allowed, text
    grammar = grammar_of(llm, HERMES, [CITY], otherwise=Constraint("regex", r"(.|\n)*")).text
    for text, allowed in (("Hi <b>\n", True), (written(HERMES, [GOOD]), True), (written(HERMES, [BAD]), False)):
        assert accepts(llm, grammar, text) == allowed, text
    with pytest.raises(InvalidParameter, match="read as a call"):
        grammar_of(llm, HERMES, [CITY], otherwise=Constraint("choice", ["a", "b<tool_call>"]))


def test_a_call_in_the_answer_of_a_form_is_text(llm: LLM) -> None:
    """With a form, a reply is calls or an answer: the text of an answer may show a call, and is none."""
    form = Constraint("json", {"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"],
                               "additionalProperties": False})  # fmt: skip
    shown = '{"k": "see <tool_call><function=get_weather><parameter=city>evil</parameter></function></tool_call>"}'
    assert accepts(llm, grammar_of(llm, XML, [CITY], otherwise=form).text, shown)
    tools = [CITY]
    for pieces in ([shown], list(shown)):
        assert read(XML, pieces, tools, exact_calls=True, calls_or_answer=True) == (shown, [])
    assert read(XML, [written(XML, [GOOD, GOOD])], tools, exact_calls=True, calls_or_answer=True) == ("", [GOOD, GOOD])


@pytest.mark.parametrize(
    "text",
    [
        "{" + " " * 300 + '"n\\u0061me": "get_weather", "parameters": {"city": "evil"}}',
        "{" + "\n" * 300 + '"x": 1, "name": "get_weather", "parameters": {"city": "evil"}}',
        '\x1c{"name": "get_weather", "parameters": {"city": "evil"}}',
    ],
)
def test_no_other_spelling_of_a_call_without_a_delimiter(llm: LLM, text: str) -> None:
    if accepts(llm, grammar_of(llm, BARE, [CITY], free=True).text, text):
        assert read(BARE, list(text), [CITY], exact_calls=True)[1] == []


def test_the_delimiter_of_an_inner_call_begins_none(llm: LLM) -> None:
    grammar = grammar_of(llm, CLOSE, [CITY], free=True, several=True).text
    evasion = written(CLOSE, [BAD]).removeprefix("<calls>")
    assert accepts(llm, grammar, evasion)
    assert read(CLOSE, list(evasion), [CITY], exact_calls=True)[1] == []
    two = f"a {written(CLOSE, [GOOD, GOOD])} b {written(CLOSE, [GOOD])}"
    assert accepts(llm, grammar, two)
    assert read(CLOSE, list(two), [CITY], exact_calls=True)[1] == [GOOD] * 3


@pytest.mark.parametrize("style", ["json", "pairs"])
@settings(max_examples=40, deadline=None)
@given(
    part=st.recursive(
        st.sampled_from([{"type": "string", "maxLength": 4}, {"type": "integer"}, {"enum": ["a", 1, None]},
                         {"type": "boolean"}, {"type": "string", "pattern": "^[x<]{1,3}$"}, {"const": "</"}]),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
            inner.map(lambda one: {"type": "array", "items": one, "maxItems": 2}),
            inner.map(lambda one: {"type": "object", "properties": {"k": one}, "required": ["k"],
                                   "additionalProperties": False}),
        ),
        max_leaves=4,
    ),
    which=st.integers(0, len(FORMATS)),
)  # fmt: skip
@example(part={"type": "string", "maxLength": 4}, which=0)
@example(part={"type": "string", "pattern": "^[x<]{1,3}$"}, which=0)
@example(part={"type": "string", "pattern": "^[x<]{1,3}$"}, which=1)
def test_whatever_a_grammar_allows_is_valid(llm: LLM, style: str, part: dict[str, Any], which: int) -> None:
    """Every walk ends and is one valid call. Refused is only a text or a structure where texts have no quotes."""
    forms = [found for found in FORMATS.values() if found.style == style]
    refused = None
    try:
        assert satisfied(llm, forms[which % len(forms)], with_value(part), seeds=2, limit=300) == 2
    except InvalidParameter as error:
        refused = error
    if refused is not None:
        told = json.dumps(part)
        mixed = '"anyOf"' in told and ('"array"' in told or '"object"' in told)
        assert mixed, refused
        assert style == "pairs", refused
        assert "one by one and without quotes" in refused.message


def test_a_refusal_names_the_tool(llm: LLM) -> None:
    tools = [strict("a"), strict("b"), strict("g", type="object", required="a")]
    with pytest.raises(InvalidParameter) as raised:
        llm.generate(HELLO, tools=tools, tool_choice=ToolChoice("function", "g"), max_tokens=3)
    assert raised.value.param == "tools.2.function.parameters"
    with pytest.raises(InvalidParameter, match="must describe an object"):
        llm.generate(HELLO, tools=[strict("a", type="array")], tool_choice=REQUIRED, max_tokens=3)


def test_a_form_that_cannot_be_is_refused_although_calls_are_required(llm: LLM) -> None:
    for constraint in (Constraint("grammar", "not a grammar"), Constraint("json", {"uniqueItems": True})):
        with pytest.raises(InvalidParameter):
            llm.generate(HELLO, tools=[strict("a")], tool_choice=REQUIRED, constraint=constraint, max_tokens=3)


def test_what_no_grammar_holds_is_checked_in_the_finished_call(llm: LLM) -> None:
    items = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    tool = replace(with_value(items), strict=False)
    outcomes = set()
    for seed in range(12):
        *_, last = llm.stream(HELLO, tools=[tool], tool_choice=ToolChoice("function", "f"), seed=seed, max_tokens=300)
        [call], error = last.deltas[0].tool_calls, last.deltas[0].schema_error
        values = json.loads(call.arguments)["a"]
        assert (error == "") == (len(set(values)) == 2), (values, error)
        assert not error or error.startswith("f: $.a")
        outcomes.add(error == "")
    assert outcomes == {True, False}
    items.pop("uniqueItems")
    tool = with_value(items)
    *_, last = llm.stream(HELLO, tools=[tool], tool_choice=REQUIRED, seed=1, max_tokens=300)
    assert last.deltas[0].schema_error is None

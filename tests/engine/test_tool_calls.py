"""Tool calls: the form is read off the template, whole calls are told, everything else stays text, in any cut."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forced_replies import forced_reply
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from engine import LLM, ChatMessage, Constraint, InvalidParameter, ToolCall
from engine.chat_template import ChatTemplate
from engine.tool_calls import CallReader, call_id
from engine.tool_format import CALL_ID, GENERIC, ToolFormat, find, generic_messages
from engine.tool_grammar import tool_grammar

HERMES = GENERIC
LISTED = ToolFormat("json", "[TOOL_CALLS][", '{"name": "', '", "arguments": ', f', "id": "{CALL_ID}"}}', ", ", "]")
FENCED = ToolFormat("json", "<calls>", "<call>function<sep>", "\n```json\n", "\n```</call>", "\n", "</calls>")
CLOSE = ToolFormat("json", "<calls>", "<call>", "<sep>", "</call>", "", "</calls>")
BARE = ToolFormat("json", "", '{"name": "', '", "parameters": ', "}", None, "")
XML = ToolFormat(
    "pairs", "", "<tool_call>\n<function=", ">", "\n</function>\n</tool_call>", "\n", "",
    "\n<parameter=", ">\n", "\n</parameter>",
)  # fmt: skip
KEYED = ToolFormat(
    "pairs", "", "<tool_call>", "", "\n</tool_call>", "\n", "", "\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"
)
FORMATS = {
    "hermes": HERMES, "listed": LISTED, "fenced": FENCED, "close": CLOSE, "bare": BARE, "xml": XML, "keyed": KEYED,
}  # fmt: skip

TOOLS: dict[str, Any] = {
    "get_weather": {
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    },
    "ping": {},
}
OSLO = ("get_weather", {"city": 'O"slo {} 7', "days": 3, "deep": {"a": [1, None]}})
PING = ("ping", {})


def written(found: ToolFormat, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model writes them."""

    def arguments(given: dict[str, Any]) -> str:
        if found.style == "json":
            return json.dumps(given)
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()}
        return "".join(f"{found.key_open}{k}{found.value_open}{v}{found.value_close}" for k, v in values.items())

    texts = [
        f"{found.open}{n}{found.middle}{arguments(a)}{found.close.replace(CALL_ID, 'x1y2z3a4b')}" for n, a in calls
    ]
    return found.begin + (found.between or "").join(texts) + found.end


def read(found: ToolFormat, pieces: list[str], **how: Any) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(found, TOOLS, **how)
    parts = [reader.push(piece) for piece in pieces] + [reader.finish()]
    calls = [(name, json.loads(arguments)) for _, found_calls in parts for name, arguments in found_calls]
    return "".join(text for text, _ in parts), calls


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("said", ["", "Let me look."])
def test_calls_are_read_whole(name: str, said: str) -> None:
    found = FORMATS[name]
    if said and name == "bare":
        return  # a mark that is no tag counts only at the beginning
    calls = [OSLO] if found.between is None else [OSLO, PING, OSLO]
    for text in (said + written(found, calls), f"{said}\n\n{written(found, calls)}\n"):
        assert read(found, [text]) == (said, calls)
        assert read(found, list(text)) == (said, calls)


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_without_arguments(name: str) -> None:
    assert read(FORMATS[name], [written(FORMATS[name], [PING])]) == ("", [PING])


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_call_stays_text(name: str) -> None:
    found = FORMATS[name]
    whole = written(found, [OSLO])
    unknown = written(found, [("format_disk", {"now": True})])
    assert read(found, [unknown]) == (unknown, [])
    broken = whole.replace("get_weather", "get weather")
    assert read(found, list(broken)) == (broken, [])
    half = whole[: whole.index("slo") + 1]
    assert read(found, list(half)) == (half, [])


@pytest.mark.parametrize(
    "text", ["", "Hi.", "a < b [x] {", "  two\n\nlines  \n", "<tool_cal", "1 </tool_call> 2", "🙂é"]
)
@pytest.mark.parametrize("name", FORMATS)
def test_plain_text_is_untouched(name: str, text: str) -> None:
    assert read(FORMATS[name], [text]) == (text, [])
    assert read(FORMATS[name], list(text)) == (text, [])


def test_a_model_that_leaves_out_the_end() -> None:
    whole = written(HERMES, [OSLO])
    for cut in ("\n</tool_call>", "</tool_call>", "call>"):
        assert read(HERMES, [whole.removesuffix(cut)]) == ("", [OSLO])
    assert read(HERMES, ['<tool_call>{"arguments":{},"name":"ping"}</tool_call>']) == ("", [PING])
    assert read(LISTED, ['[TOOL_CALLS] [{"name": "ping", "arguments": {}}]']) == ("", [PING])
    assert read(BARE, ['{"name":"ping","parameters":{}}']) == ("", [PING])


@pytest.mark.parametrize("value", ["[" * 5000, "NaN", '"\\ud800"', "1e999", "9" * 5000, "\x00", "]"])
@pytest.mark.parametrize("name", FORMATS)
def test_hostile_values_are_text_or_a_call(name: str, value: str) -> None:
    """Whatever a model writes for a value, reading it must not raise: that would end everybody's replies."""
    found = FORMATS[name]
    if found.style == "json":
        text = written(found, [("ping", {"a": "@"})]).replace('"@"', value)
    else:
        text = written(found, [("ping", {"a": "@"})]).replace("@", value)
    reader = CallReader(found, {"ping": {"parameters": {"properties": [1]}}})
    parts = [reader.push(text), reader.finish()]
    calls = [call for _, calls in parts for call in calls]
    assert calls or "".join(said for said, _ in parts) == text
    for _, arguments in calls:
        json.loads(arguments.encode())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "parameters", [{"properties": [1]}, {"properties": {"a": True}, "required": 3}, {"properties": {"a": {"type": 7}}}]
)
def test_hostile_definitions_are_refused(llm: LLM, name: str, parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    try:
        grammar = tool_grammar(llm._model.grammars, FORMATS[name], [tool], free=False, several=False).text
        llm._model.grammars.check(grammar, "tools")
    except InvalidParameter:
        return
    assert parameters == {"properties": {"a": True}, "required": 3}


def test_one_call_only() -> None:
    text = written(HERMES, [PING, OSLO])
    said, calls = read(HERMES, [text], parallel=False)
    assert calls == [PING]
    assert json.dumps(OSLO[1]) in said


def test_text_after_a_call_is_not_lost() -> None:
    text = f"{written(HERMES, [PING])}\nDone {written(HERMES, [OSLO])} and done."
    assert read(HERMES, list(text)) == ("Done\nand done.", [PING, OSLO])


PIECES = st.sampled_from(
    [*(written(found, [PING]) for found in FORMATS.values()), "<tool_call>", "</tool_call>", "{", "}", '"', "\n", " ",
     "ping", "[TOOL_CALLS]", "<call>", "</call>", "a", "<"]
)  # fmt: skip


@given(
    name=st.sampled_from(sorted(FORMATS)),
    parts=st.lists(PIECES, max_size=5),
    cuts=st.sets(st.integers(1, 300), max_size=10),
)
def test_a_cut_changes_nothing(name: str, parts: list[str], cuts: set[int]) -> None:
    text = "".join(parts)
    places = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert read(FORMATS[name], pieces) == read(FORMATS[name], [text])


FAMILIES: dict[str, str | None] = {
    "GLM-4.6": "<tool_call>NAME⏎<arg_key>KEY</arg_key>⏎<arg_value>VALUE</arg_value>…⏎</tool_call>",
    "Hermes": '<tool_call>⏎{"name": "NAME", "arguments": {…}}⏎</tool_call>',
    "Qwen2.5": '<tool_call>⏎{"name": "NAME", "arguments": {…}}⏎</tool_call>',
    "Qwen3-0.6B": '<tool_call>⏎{"name": "NAME", "arguments": {…}}⏎</tool_call>',
    "Qwen3-Coder": "<tool_call>⏎<function=NAME>⏎<parameter=KEY>⏎VALUE⏎</parameter>…⏎</function>⏎</tool_call>",
    "DeepSeek-R1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME⏎```json⏎{…}⏎```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "DeepSeek-V3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "meta-llama": '{"name": "NAME", "parameters": {…}}',
    "Mistral": '[TOOL_CALLS][{"name": "NAME", "arguments": {…}, "id": "ID"}]',
    **dict.fromkeys(("SmolLM3", "gemma", "granite", "Phi-3.5", "gpt-oss"), None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_people_run(shared: Path, family: str) -> None:
    [file] = (shared / "chat_templates").glob(f"*{family}*")
    template = ChatTemplate(file.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
    found = find(template)
    assert (found and found.describe()) == FAMILIES[family]
    if found:
        calls = [OSLO] if found.between is None else [OSLO, PING]
        text = written(found, calls)
        assert read(found, [text]) == ("", calls)
        assert read(found, list(text)) == ("", calls)


def test_a_template_without_tools_gets_them_as_text() -> None:
    tool = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}}
    call = ToolCall("call_1", "ping", "{}")
    turns = [
        ChatMessage("user", "Ping twice."),
        ChatMessage("assistant", "", tool_calls=(call, call)),
        ChatMessage("tool", "one", tool_call_id="call_1"),
        ChatMessage("tool", "two", tool_call_id="call_1"),
    ]
    system, user, calls, results = generic_messages(turns, [tool], system=True)
    assert system.role == "system"
    assert json.dumps(tool["function"]) in (system.content or "")
    assert user == turns[0]
    assert read(GENERIC, [calls.content or ""]) == ("", [PING, PING])
    assert (results.role, (results.content or "").count("<tool_response>")) == ("user", 2)
    first, *_ = generic_messages(turns, [tool], system=False)
    assert first.role == "user"
    assert (first.content or "").endswith("Ping twice.")
    assert generic_messages(turns[:1], [], system=True) == turns[:1]


def test_ids_are_unique_and_come_back() -> None:
    ids = [call_id(s, c, (1, 2), n) for s in range(5) for c in range(3) for n in range(3)]
    assert len(set(ids)) == len(ids)
    assert ids == [call_id(s, c, (1, 2), n) for s in range(5) for c in range(3) for n in range(3)]
    assert all(i.startswith("call_") and len(i) == 14 and i[5:].isalnum() for i in ids)
    assert call_id(0, 0, (1, 2), 0) != call_id(0, 0, (1, 3), 0)


# -- with a model -----------------------------------------------------------------------------------------------------

PING_TOOL = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}
HELLO = [ChatMessage("user", "Hello")]


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=1024)


def say(llm: LLM, text: str, **fields: Any) -> Any:
    """The answer of a model that is made to say this."""
    return forced_reply(llm, text, [PING_TOOL], **fields)


def test_a_call_ends_with_its_own_reason(llm: LLM) -> None:
    answer = say(llm, f"Now.\n{written(GENERIC, [PING, PING])}")
    assert (answer.text, answer.finish_reason) == ("Now.", "tool_calls")
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("ping", "{}")] * 2
    assert len({c.id for c in answer.tool_calls}) == 2
    assert answer.tool_calls == say(llm, f"Now.\n{written(GENERIC, [PING, PING])}").tool_calls


def test_no_half_call_at_the_limit(llm: LLM) -> None:
    text = written(GENERIC, [PING, PING])
    whole = say(llm, text)
    for limit in range(1, len(whole.token_ids), 3):
        answer = say(llm, text, max_tokens=limit)
        assert answer.finish_reason == "length"
        assert all(call.arguments == "{}" for call in answer.tool_calls)
        if not answer.tool_calls:
            assert answer.text == text[: len(answer.text)], "what was written is told as text"
            assert answer.text


def test_stop_strings_do_not_look_into_calls(llm: LLM) -> None:
    answer = say(llm, f"Yes.\n{written(GENERIC, [PING])}", stop=["ping", "arguments"])
    assert (answer.text, answer.finish_reason, len(answer.tool_calls)) == ("Yes.", "tool_calls", 1)
    answer = say(llm, f"Yes.\n{written(GENERIC, [PING])}", stop=["es"])
    assert (answer.text, answer.finish_reason, answer.tool_calls) == ("Y", "stop", ())


def test_without_tools_nothing_is_read(llm: LLM) -> None:
    text = written(GENERIC, [PING])
    [answer] = llm.generate(HELLO, constraint=Constraint("choice", [text]), seed=1)
    assert (answer.text, answer.finish_reason, answer.tool_calls) == (text, "stop", ())


# -- held to their schemas --------------------------------------------------------------------------------------------

STRICT: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Oslo", "Rio"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "deep": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    },
    {
        "type": "function",
        "function": {
            "name": "ping",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
            "strict": True,
        },
    },
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in STRICT}


def walk(llm: LLM, grammar: str, rng: random.Random, limit: int = 3000) -> str | None:
    """A text of a grammar, token by token by chance; None if it has not ended by then."""
    compiler, words = llm._model.grammars, llm._model.vocabulary
    state, data = compiler.start(grammar), b""
    for _ in range(limit):
        if state.stopped or (state.accepting and rng.random() < 0.3):
            return data.decode()
        allowed = compiler.masks([state], [state.forced])[0].nonzero()[0].tolist()
        token = rng.choice([i for i in allowed if i not in llm._model.end_ids])
        state.consume(token)
        data += words.token_bytes(token)
    return None


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_satisfy_their_schemas(llm: LLM, name: str) -> None:
    found = FORMATS[name]
    several = found.between is not None
    grammar = tool_grammar(llm._model.grammars, found, STRICT, free=False, several=several).text
    counts = set()
    for seed in range(12):
        text = walk(llm, grammar, random.Random(seed))
        assert text is not None
        reader = CallReader(found, {tool["function"]["name"]: tool["function"] for tool in STRICT})
        said, calls = reader.push(text)
        rest, more = reader.finish()
        assert (said + rest).strip() == "", (text, said, rest)
        assert calls + more
        for called, arguments in calls + more:
            Draft202012Validator(SCHEMAS[called]).validate(json.loads(arguments))
        counts.add(len(calls + more))
    assert (max(counts) > 1) == several


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "bare"])
def test_a_strict_call_is_held_to_its_schema_once_it_begins(llm: LLM, name: str) -> None:
    found = FORMATS[name]
    compiler = llm._model.grammars
    grammar = tool_grammar(compiler, found, STRICT, free=True, several=True).text
    good = f"Let me <see> [it].\n{written(found, [('get_weather', {'city': 'Oslo', 'days': 3})])}"
    for text, accepted in (
        ("Just text, {no} call. <", True),
        (good, True),
        (good.replace("Oslo", "Rome"), False),
        (good.replace("get_weather", "format_disk"), False),
    ):
        state = compiler.start(grammar)
        ids = llm._model.tokenizer(text, add_special_tokens=False)["input_ids"]
        taken = 0
        for token in ids:
            if not compiler.masks([state], [state.forced])[0][token]:
                break
            state.consume(token)
            taken += 1
        assert (taken == len(ids) and state.accepting) == accepted, text


@pytest.mark.parametrize("choice", ["required", ":ping", ":get_weather"])
def test_a_choice_is_enforced(llm: LLM, choice: str) -> None:
    for seed in range(4):
        [answer] = llm.generate(HELLO, tools=STRICT, tool_choice=choice, seed=seed, max_tokens=400)
        assert answer.finish_reason in ("tool_calls", "length")
        for call in answer.tool_calls:
            assert choice in ("required", f":{call.name}")
            Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))
        if answer.finish_reason == "tool_calls":
            assert answer.text == ""
            assert choice == "required" or len(answer.tool_calls) == 1


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
    [answer] = llm.generate(HELLO, tools=STRICT, constraint=form, tool_choice=":ping", seed=1, max_tokens=100)
    assert [call.name for call in answer.tool_calls] == ["ping"]
    with pytest.raises(InvalidParameter, match="whole grammar"):
        llm.generate(HELLO, tools=STRICT, constraint=Constraint("grammar", 'start: "a"'), max_tokens=3)


def llm_token(llm: LLM, text: str) -> int:
    [token] = llm._model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(token)


def test_a_strict_schema_that_cannot_be_enforced_is_refused(llm: LLM) -> None:
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "array", "uniqueItems": True}}}}
    tool = {"type": "function", "function": function}
    llm.generate(HELLO, tools=[tool], tool_choice="required", max_tokens=3)
    with pytest.raises(InvalidParameter) as raised:
        llm.generate(HELLO, tools=[{**tool, "function": {**function, "strict": True}}], max_tokens=3)
    assert raised.value.param == "tools.0.function.parameters"
    assert raised.value.details["pointer"] == "/properties/a/uniqueItems"

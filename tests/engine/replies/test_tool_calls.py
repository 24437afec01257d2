"""Tool calls: the form is read off the template, whole calls are told, everything else stays text, in any cut."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forced_replies import forced_reply
from hypothesis import given, strategies as st
from tool_forms import BARE, CLOSE, FORMATS, HERMES, KEYED, LISTED, XML, read as read_calls, written

from engine import LLM, ChatMessage, Constraint, ReplyFormat, Tool, ToolCall
from engine.prompts.tool_messages import generic_messages
from engine.replies.tool_calls.reader import CallReader, call_id
from engine.replies.tool_format import GENERIC, ToolFormat, find_tool_format
from engine.templates.chat_template import ChatTemplate

TOOLS = (
    Tool(
        "get_weather",
        parameters={"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    ),
    Tool("ping"),
)
OSLO = ("get_weather", {"city": 'O"slo {} 7', "days": 3, "deep": {"a": [1, None]}})
PING = ("ping", {})


def read(found: ToolFormat, pieces: list[str], **how: Any) -> tuple[str, list[tuple[str, Any]]]:
    return read_calls(found, pieces, how.pop("tools", TOOLS), **how)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("said", ["", "Let me look."])
def test_calls_are_read_whole(name: str, said: str) -> None:
    found = FORMATS[name]
    if said and name == "bare":
        return  # a delimiter that is no tag counts only at the beginning
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


@pytest.mark.parametrize("call", [OSLO, PING], ids=["oslo", "ping"])
@pytest.mark.parametrize(
    ("found", "cut"),
    [
        (XML, "\n</tool_call>"),
        (XML, "</tool_call>"),
        (XML, "call>"),
        (KEYED, "tool_call>"),
        (KEYED, "call>"),
        (KEYED, ">"),
    ],
)
def test_arguments_one_by_one_and_no_end(found: ToolFormat, cut: str, call: tuple[str, Any]) -> None:
    """As much of the end has to be there that no argument can follow: what may yet begin one is no call."""
    whole = written(found, [call])
    assert read(found, list(whole.removesuffix(cut))) == ("", [call])
    begun = whole[: whole.index(found.close.strip()) + 1]
    assert read(found, list(begun)) == ("", [])


@pytest.mark.parametrize("value", ["[" * 5000, "NaN", '"\\ud800"', "1e999", "9" * 5000, "\x00", "]"])
@pytest.mark.parametrize("name", FORMATS)
def test_hostile_values_are_text_or_a_call(name: str, value: str) -> None:
    """Whatever a model writes for a value, reading it must not raise: that would end everybody's replies."""
    found = FORMATS[name]
    if found.style == "json":
        text = written(found, [("ping", {"a": "@"})]).replace('"@"', value)
    else:
        text = written(found, [("ping", {"a": "@"})]).replace("@", value)
    reader = CallReader(found, ReplyFormat(tools=(Tool("ping", parameters={"properties": [1]}),)))
    parts = [reader.push(text), reader.finish()]
    calls = [call for _, calls in parts for call in calls]
    assert calls or "".join(said for said, _ in parts) == text
    for _, arguments in calls:
        json.loads(arguments.encode())


def test_one_call_only() -> None:
    text = written(HERMES, [PING, OSLO])
    said, calls = read(HERMES, [text], parallel_tool_calls=False)
    assert calls == [PING]
    assert json.dumps(OSLO[1]) in said


def test_one_call_of_a_form_without_a_closing_tag() -> None:
    text = written(LISTED, [PING, OSLO])
    reader = CallReader(LISTED, ReplyFormat(tools=TOOLS, parallel_tool_calls=False))
    _, calls = reader.push(text[: text.index("}, {") + 1])
    assert calls == [("ping", "{}")], "told as soon as it is whole"
    said, calls = read(LISTED, [text], parallel_tool_calls=False)
    assert calls == [PING]
    assert json.dumps(OSLO[1]) in said


@pytest.mark.parametrize("found", [HERMES, LISTED, CLOSE], ids=["hermes", "listed", "close"])
def test_a_closing_tag_in_a_text_is_text(found: ToolFormat) -> None:
    call = ("get_weather", {"city": 'a</tool_call>b</call>]}"{ \\" </tool_call>', "days": 1})
    for pieces in ([written(found, [call, PING])], list(written(found, [call, PING]))):
        assert read(found, pieces) == ("", [call, PING])


def test_a_quote_that_is_missing_takes_nothing_along() -> None:
    broken = '<tool_call>{"name": "ping, "arguments": {}}</tool_call>'
    assert read(HERMES, list(f"A {broken} B {written(HERMES, [PING])} C")) == (f"A {broken} B\nC", [PING])
    open_quote = '<tool_call>{"name": "ping", "arguments": {"a": "}}</tool_call>'
    assert read(HERMES, list(f"{open_quote}\n{written(HERMES, [PING])}")) == (open_quote, [PING])
    assert read(HERMES, list(f"{open_quote} {written(HERMES, [PING])}"))[1] == [PING]


def test_tags_in_many_texts_are_not_looked_at_for_ever() -> None:
    value = {"a": [1] * 20_000, "s": ["</tool_call>"] * 2_000}
    text = written(HERMES, [("ping", value)])
    assert read(HERMES, [text[i : i + 500] for i in range(0, len(text), 500)])[1] == [("ping", value)]


@pytest.mark.parametrize(
    "text",
    ["Write it as\n\n    <tool_call>x</tool_call>, then stop.", "The tag is\n <tool_call>", " \n<tool_call> \n "],
)
def test_white_space_before_what_is_no_call_is_kept(text: str) -> None:
    assert read(HERMES, [text]) == (text, [])
    assert read(HERMES, list(text)) == (text, [])


def test_what_follows_a_call_is_not_lost() -> None:
    call = written(HERMES, [PING])
    assert read(HERMES, [f"{call}\n<tool"]) == ("<tool", [PING])
    assert read(CLOSE, [f"{written(CLOSE, [PING])}\n{written(CLOSE, [PING])}"]) == ("", [PING, PING])
    assert read(LISTED, [f"{written(LISTED, [PING])}\nDone."]) == ("Done.", [PING])
    assert read(CLOSE, ["<calls><call>ping<sep>{}</call></ca"]) == ("", [PING]), "the end of a block says nothing"


# -- arguments one by one ---------------------------------------------------------------------------------------------

WRITE = Tool(
    "write",
    parameters={
        "type": "object",
        "properties": {
            "text": {"type": "string"}, "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "count": {"type": "integer"}, "list": {"type": "array"}, "a>b": {"type": "string"},
            "kind": {"enum": ["1", "true", 2]}, "ref": {"$ref": "#/$defs/word"},
        },
        "$defs": {"word": {"type": "string"}},
    },
)  # fmt: skip


def pair(found: ToolFormat, key: str, value: str) -> str:
    body = f"{found.key_open}{key}{found.value_open}{value}{found.value_close}"
    return f"{found.begin}{found.open}write{found.middle}{body}{found.close}{found.end}"


@pytest.mark.parametrize("found", [XML, KEYED], ids=["xml", "keyed"])
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("text", "    x = 1\n    y = 2\n\n", "    x = 1\n    y = 2\n\n"),
        ("text", "", ""),
        ("text", "\n", "\n"),
        ("text", "17", "17"),
        ("text", "a</parameter>b</arg_value>c</function>", "a</parameter>b</arg_value>c</function>"),
        ("text", "see </tool_call> there", "see </tool_call> there"),
        ("note", "3.10", "3.10"),
        ("note", "null", None),
        ("note", '"quoted"', '"quoted"'),
        ("count", "3", 3),
        ("count", "three", "three"),
        ("list", '["</parameter>\\n</function></tool_call>", "</arg_value></tool_call>"]',
         ["</parameter>\n</function></tool_call>", "</arg_value></tool_call>"]),
        ("a>b", "x", "x"),
        ("kind", "1", "1"),
        ("kind", "2", 2),
        ("ref", "1e5", "1e5"),
        ("unknown", "3", 3),
        ("unknown", "word", "word"),
    ],
)  # fmt: skip
def test_a_value_is_what_was_written(found: ToolFormat, key: str, value: str, expected: Any) -> None:
    text = pair(found, key, value)
    for pieces in ([text], list(text)):
        assert read(found, pieces, tools=[WRITE]) == ("", [("write", {key: expected})])


@pytest.mark.parametrize("found", [XML, KEYED], ids=["xml", "keyed"])
def test_half_a_call_is_never_told(found: ToolFormat) -> None:
    """Wherever the limit cuts, a call is told only if no argument can follow any more."""
    text = written(found, [("get_weather", {"city": "Oslo", "days": 3})])
    told = []
    for cut in range(len(text) + 1):
        said, calls = read(found, [text[:cut]])
        assert calls in ([], [("get_weather", {"city": "Oslo", "days": 3})])
        assert said in ("", text[:cut])
        told.append(bool(calls))
    assert told == sorted(told)
    assert told.count(True) > 5, "most of the closing delimiter may be missing"


def processor_time(found: ToolFormat, text: str) -> float:
    """Seconds of this thread's processor time that reading a text in pieces takes: the least of three."""
    took = []
    for _ in range(3):
        before = time.thread_time()
        read(found, [text[i : i + 50] for i in range(0, len(text), 50)])
        took.append(time.thread_time() - before)
    return min(took)


FUNCTION = "<tool_call>\n<function=ping>"
OBJECT = '<tool_call>\n{"name": "ping", "arguments": {"a": "'


@pytest.mark.parametrize(
    ("found", "begin", "part"),
    [
        (XML, f"{FUNCTION}\n<parameter=a>\n", " "),
        (XML, f"{FUNCTION}\n<parameter=a>\n", "</parameter"),
        (XML, f"{FUNCTION}\n<parameter=a>\n", "</parameter>"),
        (XML, f"{FUNCTION}\n<parameter=", " "),
        (XML, FUNCTION, " "),
        (XML, f"{FUNCTION}\n", "<"),
        (XML, f"{FUNCTION}\n<parameter=a>\nx\n</parameter>", " "),
        (XML, "<tool_call>\n<function=", "p"),
        (HERMES, "", "<tool_call>"),
        (HERMES, "<tool_call>\n", "{"),
        (HERMES, OBJECT, "</tool_call>"),
        (HERMES, OBJECT, '"</tool_call>'),
        (HERMES, OBJECT, '</tool_call>", "b": "'),
        (HERMES, OBJECT, "\\"),
        (KEYED, "<tool_call>ping\n<arg_key>", "</arg_key>\n"),
    ],
)
def test_reading_takes_time_in_proportion(found: ToolFormat, begin: str, part: str) -> None:
    """A long reply must not hold up everybody's next step: four times the text takes about four times the work.

    Going over what was read before for each piece would take sixteen times. A busy machine may spoil a measurement, so
    one good one of several is enough.
    """
    end = found.close
    short, long = (begin + part * (size // len(part)) + end for size in (4_000, 16_000))
    ratios: list[float] = []
    while len(ratios) < 6:
        ratios.append(processor_time(found, long) / processor_time(found, short))
        if ratios[-1] < 8:
            return
    pytest.fail(f"four times the text took {min(ratios):.1f} times the work")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (CLOSE, "<call>ping<sep>{}</call>"),
        (BARE, '{"parameters": {}, "name": "ping"}'),
        (BARE, 'Yes: {"name": "ping", "parameters": {}}'),
        (LISTED, '[TOOL_CALLS][{"arguments": {}, "name": "ping", "id": "abcdef001"}]'),
    ],
)
def test_under_a_grammar_only_what_the_form_writes_is_a_call(found: ToolFormat, text: str) -> None:
    assert read(found, [text], exact_calls=True) == (text, [])
    assert read(found, list(text), exact_calls=True) == (text, [])


def test_arguments_are_found_by_the_forms_own_name_and_by_the_usual_ones() -> None:
    own = replace(HERMES, middle='", "args": ')
    for key in ("args", "arguments", "parameters"):
        text = f'<tool_call>\n{{"name": "ping", "{key}": {{"a": 1}}}}\n</tool_call>'
        assert read(own, [text]) == ("", [("ping", {"a": 1})]), key


def test_under_a_grammar_white_space_is_free_and_what_begins_no_call_is_shown_at_once() -> None:
    assert read(BARE, list('{"name":"ping", "parameters":{}}'), exact_calls=True) == ("", [PING])
    reader = CallReader(BARE, ReplyFormat(tools=TOOLS, exact_calls=True))
    assert reader.push('{"na')[0] == ""
    assert reader.push('ture": 1') == ('{"nature": 1', [])


@pytest.mark.parametrize("name", FORMATS)
def test_under_a_grammar_calls_are_read_alike(name: str) -> None:
    found = FORMATS[name]
    calls = [OSLO] if found.between is None else [OSLO, PING, OSLO]
    for pieces in ([written(found, calls)], list(written(found, calls))):
        assert read(found, pieces, exact_calls=True) == ("", calls)


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
    found = find_tool_format(template)
    assert (found and found.describe()) == FAMILIES[family]
    if found:
        calls = [OSLO] if found.between is None else [OSLO, PING]
        text = written(found, calls)
        assert read(found, [text]) == ("", calls)
        assert read(found, list(text)) == ("", calls)


def test_a_template_without_tools_gets_them_as_text() -> None:
    tool = Tool("ping", parameters={"type": "object"})
    call = ToolCall("call_1", "ping", "{}")
    turns = [
        ChatMessage("user", "Ping twice."),
        ChatMessage("assistant", "", tool_calls=(call, call)),
        ChatMessage("tool", "one", tool_call_id="call_1"),
        ChatMessage("tool", "two", tool_call_id="call_1"),
    ]
    system, user, calls, results = generic_messages(turns, [tool], system=True)
    assert system.role == "system"
    assert json.dumps({"name": "ping", "parameters": {"type": "object"}}) in (system.content or "")
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

PING_TOOL = Tool("ping", parameters={"type": "object", "properties": {}})
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
        assert answer.text == "", "no markup is shown"


def test_stop_strings_do_not_look_into_calls(llm: LLM) -> None:
    answer = say(llm, f"Yes.\n{written(GENERIC, [PING])}", stop=["ping", "arguments"])
    assert (answer.text, answer.finish_reason, len(answer.tool_calls)) == ("Yes.", "tool_calls", 1)
    answer = say(llm, f"Yes.\n{written(GENERIC, [PING])}", stop=["es"])
    assert (answer.text, answer.finish_reason, answer.tool_calls) == ("Y", "stop", ())


def test_without_tools_nothing_is_read(llm: LLM) -> None:
    text = written(GENERIC, [PING])
    [answer] = llm.generate(HELLO, constraint=Constraint("choice", [text]), seed=1)
    assert (answer.text, answer.finish_reason, answer.tool_calls) == (text, "stop", ())


@pytest.mark.parametrize("begin", [f"{FUNCTION}\n<no parameter", f"{FUNCTION[:-1]} oops>", f"{FUNCTION[:-1]}<oops>"])
def test_a_call_that_turns_out_to_be_none_is_shown_with_its_end(begin: str) -> None:
    """Not held back until the reply ends, also if its last delimiter comes in pieces."""
    reader = CallReader(XML, ReplyFormat(tools=TOOLS))
    shown = [reader.push(piece)[0] for piece in (begin, " here", "\n</tool", "_call>", " and on")]
    assert shown == ["", "", "", f"{begin} here\n</tool_call>", " and on"]


def test_names_and_values_of_pairs_stay_as_they_are_written() -> None:
    tool = Tool("ping", parameters={"properties": {"größe": {"type": "string"}}})
    text = f"{FUNCTION}\n<parameter=größe>\nsehr groß\n</parameter>\n</function>\n</tool_call>"
    reader = CallReader(XML, ReplyFormat(tools=(tool,)))
    assert reader.push(text) == ("", [("ping", '{"größe": "sehr groß"}')])

"""A call that breaks off shows no markup: only the text and the whole calls before it, wherever the reply ends."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forced_replies import forced_reply
from hypothesis import given, strategies as st
from tool_forms import BARE, CLOSE, FORMATS, HERMES, KEYED, LISTED, XML, written

from engine import LLM, ReplyFormat, Tool
from engine.replies.chat_format import find_chat_format
from engine.replies.reasoning import ReasoningFormat, Splitter
from engine.replies.reply_parser import DelimiterParser
from engine.replies.response_template import ResponseTemplate, TemplateParser
from engine.replies.tool_calls.reader import CallReader
from engine.replies.tool_format import GENERIC, ToolFormat
from engine.templates.chat_template import ChatTemplate

TOOLS = (
    Tool(
        "get_weather",
        parameters={"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    ),
    Tool("fs.read/all"),
)
OSLO = ("get_weather", {"city": 'O"slo {} 7', "days": 3, "deep": {"a": [1, None]}})
READ = ("fs.read/all", {})


def read(found: ToolFormat, pieces: list[str], *, cut: bool, **how: Any) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(found, ReplyFormat(tools=TOOLS, **how))
    parts = [*map(reader.push, pieces), reader.finish(cut=cut)]
    return "".join(text for text, _ in parts), [(name, json.loads(a)) for _, calls in parts for name, a in calls]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("said", ["", "Let me look.\n\n"])
@pytest.mark.parametrize("name", FORMATS)
def test_wherever_a_limit_cuts_no_markup_is_shown(name: str, said: str, exact: bool) -> None:
    """The law, for every notation and every place: what was said, and the calls so far, each of them whole."""
    found = FORMATS[name]
    if said and name == "bare":
        pytest.skip("a call without a tag is all of a reply")
    calls = [OSLO] if found.between is None else [OSLO, READ]
    text = said + written(found, calls)
    told = []
    for end in range(len(said), len(text) + 1):
        shown, whole = read(found, [text[:end]], cut=True, exact_calls=exact)
        assert read(found, list(text[:end]), cut=True, exact_calls=exact) == (shown, whole), "streams show the same"
        assert shown.rstrip() == said.rstrip(), text[:end]
        assert whole == calls[: len(whole)]
        told.append(len(whole))
    assert told == sorted(told)
    assert told[-1] == len(calls)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_that_breaks_a_call_off_shows_no_markup_either(name: str) -> None:
    """With more of it than its opening there can be no doubt, whatever ended the reply."""
    found = FORMATS[name]
    said = "" if name == "bare" else "Let me look."
    text = f"{said}\n{written(found, [OSLO])}" if said else written(found, [OSLO])
    for end in range(text.index("get_weather") + 1, text.index("slo")):
        assert read(found, [text[:end]], cut=False) == (said, [])


MENTIONS = [
    # a form, a text that only names a tag or looks like the beginning of a call
    (HERMES, "Calls stand between <tool_call> and its end, as the template says."),
    (HERMES, "<tool_call> is the tag. Then comes JSON like {} and"),
    (XML, "The tag <tool_call> is followed by a function"),
    (KEYED, "<tool_call> is the tag; it holds keys"),
    (CLOSE, "<calls> is a tag and so is <call>"),
    (LISTED, "[TOOL_CALLS] precedes a list"),
    (LISTED, "See [1] and [2]"),
    (BARE, '{"nature": 1, "b": [2'),
    (BARE, '{"nature": 1}'),
    (HERMES, "a < b and c <= d"),
    (HERMES, "two lines \n"),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call> and'),
    (HERMES, '<tool_call>{"name": "get_weather", "arguments": {}} and then I thought'),
    # what has begun and can be no call of these tools
    (HERMES, 'See <tool_call>\n{"foo": 1, more text'),
    (HERMES, 'See <tool_call>\n{"foo": 1'),
    (HERMES, 'See <tool_call>\n{"foo": 1}'),
    (HERMES, 'See <tool_call>\n{"foo'),
    (HERMES, 'See <tool_call>\n{"name": "rm", "arguments": {"path": "/'),
    (HERMES, 'See <tool_call>\n{"name": "rm'),
    (HERMES, 'See <tool_call>\n{"name": 7'),
    (HERMES, 'See <tool_call>\n{"arguments": {"a": 1}, "name": "rm'),
    (HERMES, 'See <tool_call>\n{"name": "get_weather" and so on'),
    (HERMES, 'See <tool_call>\n{"name" is the first key'),
    (HERMES, "<tool_call>{a dictionary, as Python"),
    (LISTED, 'See [TOOL_CALLS][{"name": "rm", "arguments": {"path": "/'),
    (CLOSE, "See <calls><call>rm<sep>{"),
    (CLOSE, "See <calls><call>get_weather<sep>and so on"),
    (XML, "See <tool_call>\n<function=rm>\n<parameter=path>\n/"),
    (XML, "See <tool_call>\n<function=rm"),
    (KEYED, "See <tool_call>rm\n<arg_key>path</arg_key>"),
    (BARE, '{"name": "Bob", "bio": "word word'),
    (BARE, '{"name": "Bob'),
    (BARE, '{"name": "get_weather forecast'),
    (BARE, '{"name": "get_weather\\u0021", "bio": "word'),
    (BARE, ' {\n "name": "Bob",\n "bio": "a'),
    (BARE, '{"bio": "word word'),
]


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(("found", "text"), MENTIONS)
def test_what_is_no_call_is_shown(found: ToolFormat, text: str, cut: bool) -> None:
    assert read(found, [text], cut=cut) == (text, [])
    assert read(found, list(text), cut=cut) == (text, [])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("answer", ['{"name": "Bob", "bio": "word', '{ "name" :"got', '{"name": "get_w!'])
def test_an_answer_that_begins_like_a_call_is_streamed_once_its_name_is_no_tools(answer: str, exact: bool) -> None:
    reader = CallReader(BARE, ReplyFormat(tools=TOOLS, exact_calls=exact))
    shown = [reader.push(character)[0] for character in answer]
    assert "".join(shown) == answer
    assert reader.push(' "more"}') == (' "more"}', [])


def test_under_a_grammar_an_answer_may_name_a_tool() -> None:
    """There a call is written to the letter."""
    answer = '{"name": "get_weather", "city": "Os'
    assert read(BARE, list(answer), cut=True, exact_calls=True) == (answer, [])
    assert read(BARE, [answer], cut=False, exact_calls=True) == (answer, [])


CUT_CALLS = [
    # calls whose members come in another order, or with escapes
    (HERMES, '<tool_call>{"id": "x", "na'),
    (HERMES, '<tool_call>{"arguments": {"city": "Os'),
    (HERMES, '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_'),
    (HERMES, '<tool_call>{"name": "get\\u005fwea'),
    (HERMES, '<tool_call>{"name": "get_weather", "arguments": {}}\n</tool'),
    (BARE, '{"name": "get\\u005fweather", "parameters": {"city'),
    (BARE, '{ "name": "get_weather", "parameters": {'),
]


@pytest.mark.parametrize(("found", "text"), CUT_CALLS)
def test_however_a_call_is_written_its_half_is_no_text(found: ToolFormat, text: str) -> None:
    assert read(found, [text], cut=False)[0] == ""
    assert read(found, list(text), cut=True)[0] == ""


@pytest.mark.parametrize("opening", ["<", "<tool", "<tool_call>", "<tool_call>\n"])
def test_the_beginning_of_an_opening_is_text_only_where_the_model_ended_itself(opening: str) -> None:
    assert read(HERMES, [f"The tag is {opening}"], cut=True) == ("The tag is", [])
    assert read(HERMES, [f"The tag is {opening}"], cut=False) == (f"The tag is {opening}", [])
    after = f"{written(HERMES, [READ])}\n{opening}"
    assert read(HERMES, list(after), cut=True) == ("", [READ])
    assert read(HERMES, list(after), cut=False) == (opening, [READ])


PIECES = st.sampled_from(["<tool_call>", "{", '{"name": "', "ping", "\n", "<call>", "[TOOL_CALLS]", "a ", '"'])


@given(
    name=st.sampled_from(sorted(FORMATS)),
    parts=st.lists(PIECES, max_size=6),
    cuts=st.sets(st.integers(1, 80), max_size=8),
    cut=st.booleans(),
)  # fmt: skip
def test_pieces_change_nothing(name: str, parts: list[str], cuts: set[int], cut: bool) -> None:
    text = "".join(parts)
    places = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert read(FORMATS[name], pieces, cut=cut) == read(FORMATS[name], [text], cut=cut)


# -- read by a response template ---------------------------------------------------------------------------------------

MARKED = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}
TABLE = {
    name: find_chat_format(ChatTemplate(spellings + "{{ messages }}")).response_template
    for name, spellings in {
        "granite": "{# <|tool_call|><|start_of_role|> #}",
        "gpt-oss": "{# <|channel|>analysis<|message|> functions. #}",
    }.items()
}
ARGUMENTS = json.dumps(OSLO[1])
BY_TEMPLATE = {
    "marked": (ResponseTemplate(MARKED), f'<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}}}</tool_call>'),
    "granite": (TABLE["granite"], f'<|tool_call|>[{{"name": "get_weather", "arguments": {ARGUMENTS}}}]'),
    "gpt-oss": (
        TABLE["gpt-oss"],
        f"<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}",
    ),
    "gpt-oss, a path": (
        TABLE["gpt-oss"],
        f"<|start|>assistant<|channel|>commentary to=functions.fs.read/all <|constrain|>json<|message|>{ARGUMENTS}",
    ),
}


def parsed(template: Any, pieces: list[str], *, cut: bool) -> tuple[str, int]:
    parser = TemplateParser(template, ReplyFormat(chat=True, tools=TOOLS))
    parts = [*map(parser.push, pieces), parser.finish(cut=cut)]
    return "".join(part.text for part in parts), sum(len(part.calls) for part in parts)


@pytest.mark.parametrize("said", ["", "Let me look.\n"])
@pytest.mark.parametrize("name", BY_TEMPLATE)
def test_no_markup_through_a_response_template(name: str, said: str) -> None:
    template, call = BY_TEMPLATE[name]
    text = said + call
    for end in range(len(said), len(text) + 1):
        shown, calls = parsed(template, [text[:end]], cut=True)
        assert shown.rstrip() == said.rstrip(), text[:end]
        assert calls <= 1
        assert parsed(template, list(text[:end]), cut=True) == (shown, calls)
    assert parsed(template, [text], cut=True)[1] == 1
    begun = text.index(ARGUMENTS) + 2
    assert parsed(template, [text[:begun]], cut=False) == (said.rstrip(), 0)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(
    "text", ["The tag <tool_call> holds JSON", '<tool_call>{"name": "rm", "arguments": {}} and', "Just text. \n"]
)
def test_a_response_template_shows_what_is_no_call(text: str, cut: bool) -> None:
    assert parsed(BY_TEMPLATE["marked"][0], [text], cut=cut) == (text, 0)


THOUGHT = "Is a < b?\n"
THINKERS: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    # how replies are read: what makes a parser, and the delimiters around thoughts and before an answer
    "delimiters": (
        lambda: DelimiterParser(Splitter(ReasoningFormat("<think>", "</think>", "</think>"), opened=False), None),
        "<think>", "</think>", "",
    ),
    "delimiters and calls": (
        lambda: DelimiterParser(
            Splitter(ReasoningFormat("<|a|>", "<|e|><|f|>", "<|e|><|f|>", "<|f|>"), opened=False),
            CallReader(HERMES, ReplyFormat(tools=TOOLS)),
        ),
        "<|a|>", "<|e|><|f|>", "",
    ),
    "no thoughts": (
        lambda: DelimiterParser(Splitter(ReasoningFormat("<|a|>", "<|e|>", "<|e|>", "<|f|>"), opened=False), None),
        "", "", "<|f|>",
    ),
    "template": (
        lambda: TemplateParser(ResponseTemplate(MARKED), ReplyFormat(chat=True, tools=TOOLS)),
        "<think>", "</think>", "",
    ),
    "gpt-oss": (
        lambda: TemplateParser(TABLE["gpt-oss"], ReplyFormat(chat=True)),
        "<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant<|channel|>final<|message|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THINKERS)
def test_wherever_a_limit_cuts_thoughts_have_no_markup(name: str) -> None:
    """Thoughts and answer are as far as they are certain, in whole replies and in streams; each only grows."""
    make, opening, closing, before = THINKERS[name]
    thought = THOUGHT if opening else ""
    text = f"{opening}{thought}{closing}{before}Yes."
    told = []
    for end in range(len(text) + 1):
        whole, stream = make(), make()
        parts = [whole.push(text[:end]), whole.finish(cut=True)]
        pieces = [*map(stream.push, text[:end]), stream.finish(cut=True)]
        thoughts, answer = ("".join(getattr(part, what) for part in parts) for what in ("reasoning", "text"))
        assert thoughts == "".join(part.reasoning for part in pieces)
        assert answer == "".join(part.text for part in pieces)
        assert thought.startswith(thoughts), text[:end]
        assert "Yes.".startswith(answer), text[:end]
        told.append((len(thoughts), len(answer)))
    assert told[-1] == (len(thought.rstrip()), 4)


def test_a_model_that_ends_itself_has_said_all_of_it() -> None:
    parser = THINKERS["delimiters"][0]()
    assert parser.push("<think>hm </thi").reasoning + parser.finish(cut=False).reasoning == "hm </thi"


# -- with a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=1024)


def test_a_reply_at_its_limit(llm: LLM) -> None:
    """The reason is `length`, and there is no call; log-probabilities tell every token of what is not shown."""
    text = f"Now.\n{written(GENERIC, [READ])}"
    whole = forced_reply(llm, text, [*TOOLS])
    assert (whole.text, whole.finish_reason, len(whole.tool_calls)) == ("Now.", "tool_calls", 1)
    shown = set()
    for limit in range(1, len(whole.token_ids) - 1, 2):
        answer = forced_reply(llm, text, [*TOOLS], max_tokens=limit, logprobs=True)
        assert "Now.".startswith(answer.text.rstrip()), answer.text
        assert answer.finish_reason == "length"
        assert len(answer.logprobs or ()) == len(answer.token_ids) == limit
        shown.add(answer.text.rstrip())
    assert "Now." in shown

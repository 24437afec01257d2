"""Where a model's speech is learnt from, and replies read by a response template, in any cut, with nothing lost."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forced_replies import forced_reply
from hypothesis import given, strategies as st
from transformers.utils.chat_parsing import parse_response

from engine import LLM, Constraint, InvalidParameter, LoadError, ReplyFormat, Tool, ToolChoice
from engine.errors import InvalidFormat, ReplyFault
from engine.prompts.tool_messages import one_call_a_turn
from engine.replies.chat_format import ChatFormat, find_chat_format
from engine.replies.response_template import ResponseTemplate, TemplateParser
from engine.replies.tool_format import CALL_ID
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage, ToolCall

TOOLS = (
    Tool("get_weather", parameters={"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),
    Tool("ping"),
)
READ = ReplyFormat(chat=True, tools=TOOLS)
FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
MARKED = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>"},
    },
}
PARAMETERS = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>\w+)>\s*(?P<value>.*?)\s*</parameter>",
                "value_parser": {"name": "json", "args": {"allow_non_json": True}},
            },
            "transform": FUNCTION,
        },
    },
}
OPENED = {  # thoughts begin with the reply, whether or not a delimiter says so
    "start_anchor": "Assistant:",
    "fields": {
        "thinking": {"open_pattern": r"(?:^|<think>\s*)", "close": "</think>"},
        "content": {"open": "<response>\n", "close_pattern": r"\n?</response>"},
        "tool_calls": MARKED["fields"]["tool_calls"],  # type: ignore[index]
    },
}
PLAIN = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
GRANITE, GPT_OSS = (
    find_chat_format(ChatTemplate(spellings + "{{ messages }}"))
    for spellings in ("{# <|tool_call|><|start_of_role|> #}", "{# <|channel|>analysis<|message|> functions. #}")
)


def template_of(chat_format: ChatFormat) -> dict[str, Any]:
    assert chat_format.response_template is not None
    return dict(chat_format.response_template.source)


TEMPLATES = {
    "marked": MARKED,
    "parameters": PARAMETERS,
    "opened": OPENED,
    "granite": template_of(GRANITE),
    "gpt-oss": template_of(GPT_OSS),
}


def read(source: dict[str, Any], pieces: list[str], **how: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    parser = TemplateParser(ResponseTemplate(source), ReplyFormat(**{"chat": True, "tools": TOOLS, **how}))
    parts = [*(parser.push(piece) for piece in pieces), parser.finish()]
    calls = [(name, json.loads(arguments)) for part in parts for name, arguments in part.calls]
    return "".join(p.reasoning for p in parts), "".join(p.text for p in parts), calls


WEATHER = ("get_weather", {"city": "Oslo", "days": 3})
CASES: list[tuple[str, str, tuple[str, str, list[Any]]]] = [
    ("marked", "Just text.", ("", "Just text.", [])),
    ("marked", "  two\n\nlines  \n", ("", "  two\n\nlines  \n", [])),
    ("marked", "<think>\nhm\n</think>\n\nHi  there\n", ("hm", "Hi  there\n", [])),
    (
        "marked",
        '<think>hm</think>\nLet me look.\n<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "Oslo", "days": 3}}\n</tool_call>\n<tool_call>{"name": "ping", "arguments": {}}</tool_call>',
        ("hm", "Let me look.", [WEATHER, ("ping", {})]),
    ),
    ("marked", '<tool_call>{"name": "ping", "arguments": {}}</tool_call> done', ("", "done", [("ping", {})])),
    ("marked", "<think>cut sho", ("cut sho", "", [])),
    (
        "parameters",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        ("", "", [WEATHER]),
    ),
    (
        "parameters",
        "<tool_call><function=get_weather><parameter=city>\n17\n</parameter></function></tool_call>",
        ("", "", [("get_weather", {"city": "17"})]),
    ),
    ("opened", "hm\n</think>\n<response>\nHi\n</response>", ("hm", "Hi", [])),
    ("granite", "<think>hm</think><response>Hi there.</response>", ("hm", "Hi there.", [])),
    ("granite", "No tags at all.", ("", "No tags at all.", [])),
    (
        "granite",
        '<|tool_call|>[{"name": "ping", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Rio"}}]',
        ("", "", [("ping", {}), ("get_weather", {"city": "Rio"})]),
    ),
    (
        "gpt-oss",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi",
        ("hm", "Hi", []),
    ),
    ("gpt-oss", "<|channel|>final<|message|>Hi", ("", "Hi", [])),
    (
        "gpt-oss",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo", "days": 3}',
        ("a\nb", "I look.", [WEATHER]),
    ),
    ("gpt-oss", " to=functions.ping<|channel|>commentary json<|message|>{}<|call|>", ("", "", [("ping", {})])),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_replies_are_taken_apart(name: str, text: str, expected: Any) -> None:
    source = TEMPLATES[name]
    assert read(source, [text]) == expected
    assert read(source, list(text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"), [c for c in CASES if c[0] in ("marked", "parameters", "gpt-oss")]
)
def test_transformers_reads_the_same(name: str, text: str, expected: Any) -> None:
    parsed = parse_response(text, TEMPLATES[name], prefix="", tools=None)
    assert (parsed.get("thinking") or "") in (expected[0], expected[0].split("\n")[-1])
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in parsed.get("tool_calls") or []]
    assert [name for name, _ in calls] == [name for name, _ in expected[2]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("marked", '<tool_call>{"name": "format_disk", "arguments": {}}</tool_call>'),
        ("marked", "<tool_call>no JSON</tool_call>"),
        ("marked", '<tool_call>{"name": "ping", "arguments": [1]}</tool_call>'),
        ("marked", '<tool_call>{"name": "ping", "arguments": {"a": NaN}}</tool_call>'),
        ("marked", '<tool_call>{"name": "ping", "arguments": {"a": "\\ud800"}}</tool_call>'),
        ("marked", f'<tool_call>{{"name": "ping", "arguments": {{"a": {"[" * 5000}}}}}</tool_call>'),
        ("marked", "<tool_call>[]</tool_call>"),
        ("parameters", "<tool_call><function=format_disk></function></tool_call>"),
        ("granite", '<|tool_call|>{"name": "ping", "arguments": {}}'),
    ],
)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    assert read(TEMPLATES[name], [f"Yes. {text}"])[1:] == (f"Yes. {text}", [])
    assert read(TEMPLATES[name], list(text)) == ("", text, [])


def test_without_tools_calls_are_not_read() -> None:
    text = 'Yes. <tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    assert read(MARKED, list(text), tools=()) == ("", text, [])


def test_one_call_only() -> None:
    text = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    thoughts, said, calls = read(MARKED, [text + text], parallel_tool_calls=False)
    assert (thoughts, said, calls) == ("", text, [("ping", {})])


@pytest.mark.parametrize(
    ("source", "prompt", "opening", "thinking"),
    [
        (MARKED, "<|im_start|>assistant\nHi<|im_end|><|im_start|>assistant\n", "", False),
        (MARKED, "<|im_start|>assistant\n<think>\n", "<think>\n", True),
        (MARKED, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n", False),
        (MARKED, "no such turn", "", False),
        (OPENED, "Assistant:", "", False),
    ],
)
def test_what_the_prompt_has_written_counts(source: dict[str, Any], prompt: str, opening: str, thinking: bool) -> None:
    template = ResponseTemplate(source)
    assert template.opening(prompt) == opening
    parser = TemplateParser(template, replace(READ, opening=opening))
    assert parser.thinking == thinking
    parts = [parser.push("hm" if not thinking else "hm</think>ok"), parser.finish()]
    assert "".join(p.text for p in parts) in ("ok", "hm", "")


PIECES = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "ping", "arguments": {}}', "<function=ping>", "\n",
     " ", "ß", "<", "<response>\n", "\n</response>", "<|tool_call|>", "[", "]", "<|channel|>", "analysis",
     "<|message|>", "<|end|>", "final", "commentary", " to=functions.ping", "<|call|>", "{}", "<|start|>assistant"]
)  # fmt: skip


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    parts=st.lists(PIECES, max_size=12),
    cuts=st.sets(st.integers(1, 200), max_size=12),
)
def test_a_cut_changes_nothing_and_nothing_is_lost(name: str, parts: list[str], cuts: set[int]) -> None:
    text = "".join(parts)
    places = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = read(TEMPLATES[name], [text])
    assert read(TEMPLATES[name], pieces) == whole
    if name in ("marked", "opened", "granite"):  # the others have free text in their delimiters
        assert (whole[0] + whole[1]).count("ß") == text.count("ß")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"open_pattern": r"(x+x+)+y", "close": "z"}, "x" * 60),  # takes for ever
        ({"open_pattern": r"(?=a)", "close_pattern": r"(?=a)"}, "banana"),  # delimiters without a character
        ({"open_pattern": r"", "close_pattern": r""}, "banana"),
    ],
)
def test_patterns_that_never_end(field: dict[str, Any], text: str) -> None:
    source = {"start_anchor": "A", "fields": {"content": field}}
    assert read(source, [text]) == ("", text, [])


def test_a_long_reply_does_not_pile_up() -> None:
    parser = TemplateParser(ResponseTemplate(OPENED), READ)
    parser.push("</think>")
    said = "".join(parser.push("word ").text for _ in range(20_000)) + parser.finish().text
    assert said == "word " * 20_000
    assert len(parser._buffer) < 10_000


def test_long_thoughts_do_not_pile_up_and_a_long_call_is_read_once() -> None:
    parser = TemplateParser(ResponseTemplate(MARKED), READ)
    parser.push("<think>")
    thought = "".join(parser.push("word ").reasoning for _ in range(20_000))
    assert len(parser._buffer) < 10_000
    parser.push('</think><tool_call>{"name": "ping", "arguments": {"a": "')
    for _ in range(20_000):
        parser.push("word ")
        assert len(parser._buffer) - parser._at < 100, "what was searched is searched again"
    [(name, arguments)] = parser.push('"}}</tool_call>').calls
    assert (name, json.loads(arguments)) == ("ping", {"a": "word " * 20_000})
    assert thought + " " == "word " * 20_000


# -- where it comes from ----------------------------------------------------------------------------------------------


def test_the_order_of_sources() -> None:
    assert find_chat_format(PLAIN).source == "generic"
    assert find_chat_format(PLAIN, shipped=MARKED).source == "tokenizer"
    assert find_chat_format(PLAIN, shipped=MARKED, given=PARAMETERS).source == "models.yaml"
    assert (GRANITE.source, GPT_OSS.source) == ("table (granite)", "table (gpt-oss)")
    calls = (
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}<args>{{ c.function.arguments | tojson }}</call>"
    )
    source = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{calls}{{% endfor %}}</turn>{{% endfor %}}"
    assert find_chat_format(ChatTemplate(source)).source == "chat template"


def test_calls_are_enforced_only_in_a_form_that_is_read() -> None:
    assert find_chat_format(PLAIN, shipped=MARKED).tool_format is not None, "the generic form is read by this template"
    assert find_chat_format(PLAIN, shipped=PARAMETERS).tool_format is None


def test_a_shipped_template_that_is_none_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    for broken in ({}, {"fields": {"content": 3}}, {"fields": {"content": {}}}, {"start_anchor": "a", "fields": [1]}):
        found = find_chat_format(PLAIN, shipped=broken)
        assert (found.source, found.response_template) == ("generic", None)
        assert "response_template" in caplog.text
        with pytest.raises(ValueError, match=r"\w"):
            find_chat_format(PLAIN, given=broken)


TABLE = {
    "GLM-4.6": "chat template",
    "Hermes": "chat template",
    "Qwen2.5": "chat template",
    "Qwen3-0.6B": "chat template",
    "Qwen3-Coder": "chat template",
    "DeepSeek-R1": "chat template",
    "DeepSeek-V3.1": "chat template",
    "meta-llama": "chat template",
    "Mistral": "chat template",
    "gpt-oss": "table (gpt-oss)",
    "granite": "table (granite)",
    **dict.fromkeys(("SmolLM3", "gemma", "Phi-3.5"), "generic"),
}


@pytest.mark.parametrize("family", TABLE)
def test_families_that_people_run(shared: Path, family: str) -> None:
    [file] = (shared / "chat_templates").glob(f"*{family}*")
    template = ChatTemplate(file.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
    assert find_chat_format(template).source == TABLE[family]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", TABLE)
def test_families_are_read_alike_in_any_cut(shared: Path, family: str, exact: bool) -> None:
    """Thoughts, text and calls as the family writes them, cut two hundred ways: always the whole reply's parts."""
    [file] = (shared / "chat_templates").glob(f"*{family}*")
    chat_format = find_chat_format(
        ChatTemplate(file.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
    )
    form, delimiters = chat_format.tool_format, chat_format.reasoning
    assert form is not None

    def arguments(given: dict[str, Any]) -> str:
        if form.style == "json":
            return json.dumps(given)
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()}
        return "".join(f"{form.key_open}{k}{form.value_open}{v}{form.value_close}" for k, v in values.items())

    calls = (
        [WEATHER] if form.between is None else [WEATHER, ("ping", {}), ("get_weather", {"city": 'O"slo', "days": 1})]
    )
    written = [f"{form.open}{n}{form.middle}{arguments(a)}{form.close.replace(CALL_ID, 'abcdef001')}" for n, a in calls]
    text = form.begin + (form.between or "").join(written) + form.end
    said = "" if "{" in form.delimiter[:1] or (delimiters and delimiters.resume) else "Let me look.\n"
    thoughts = ""
    if delimiters is not None:
        thoughts = "Weather? <hm> é"
        text = f"{delimiters.open}{thoughts}{delimiters.close}{delimiters.resume}{said}{text}"
    else:
        text = said + text

    def parts(pieces: list[str]) -> tuple[str, str, list[tuple[str, Any]]]:
        parser = chat_format.parser(replace(READ, exact_calls=exact))
        assert parser is not None
        found = [*(parser.push(piece) for piece in pieces), parser.finish()]
        read_calls = [(name, json.loads(written)) for part in found for name, written in part.calls]
        return "".join(f.reasoning for f in found), "".join(f.text for f in found), read_calls

    expected = (thoughts, said.strip(), calls)
    assert parts([text]) == expected
    assert parts(list(text)) == expected
    rng = random.Random(family)
    for _ in range(200):
        places = [0, *sorted(rng.sample(range(1, len(text)), rng.randrange(1, 20))), len(text)]
        assert parts([text[a:b] for a, b in itertools.pairwise(places)]) == expected


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "string"}, "3.10", "3.10"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "1e5", "1e5"),
        ({"type": "number"}, "3.5", 3.5),
        ({"type": "integer"}, "x", "x"),
    ],
)
def test_a_value_in_tags_is_what_its_schema_says(schema: dict[str, Any], value: str, expected: Any) -> None:
    text = f"<tool_call><function=f><parameter=a>\n{value}\n</parameter></function></tool_call>"
    tools = (Tool("f", parameters={"properties": {"a": schema}}),)
    assert read(PARAMETERS, [text], tools=tools) == ("", "", [("f", {"a": expected})])


def test_white_space_and_closing_tags_in_a_template() -> None:
    text = "Write it as\n\n    <tool_call>x</tool_call>, then."
    assert read(MARKED, [text]) == read(MARKED, list(text)) == ("", text, [])
    quoted = '<tool_call>{"name": "ping", "arguments": {"a": "x</tool_call>y"}}</tool_call> done'
    for pieces in ([quoted], list(quoted)):
        assert read(MARKED, pieces) == ("", "done", [("ping", {"a": "x</tool_call>y"})])


@pytest.mark.parametrize("pattern", ["foo bar baz|foo", "foo[^<]*z|bar", "(?:foo )+bar|foo"])
def test_expressions_of_different_lengths_do_not_depend_on_the_cut(pattern: str) -> None:
    source = {"start_anchor": "A:", "fields": {"thinking": {"open_pattern": pattern, "close": "</t>"}, "content": {}}}
    for text in ("foo bar baz", "a foo bar b", "foo foo bar z x", "foo b", "fo"):
        whole = read(source, [text])
        for cut in range(1, len(text)):
            assert read(source, [text[:cut], text[cut:]]) == whole
        assert read(source, list(text)) == whole


def test_searching_a_reply_is_bounded() -> None:
    """A delimiter that is never certain is not searched for ever, and no text is lost."""
    source = {
        "start_anchor": "A:",
        "fields": {"thinking": {"open_pattern": "<[^>]*>x", "close": "</t>"}, "content": {}},
    }
    text = "<" + "word " * 4000
    parser = TemplateParser(ResponseTemplate(source), READ)
    parts = [parser.push(text[i : i + 2]) for i in range(0, len(text), 2)]
    assert sum(bool(part.text) for part in parts) > 10, "given up before the end"
    assert "".join(part.text for part in [*parts, parser.finish()]) == text


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"open_pattern": "(?:a|b|ab)*c", "close": "</t>"}, "ab" * 40 + "dc"),
        ({"open": "<t>", "close_pattern": "(?:a|b|ab)*c"}, "<t>" + "ab" * 40 + "dc"),
        (
            {
                "open": "<t>",
                "close": "</t>",
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": "(?P<key>(?:a|b|ab)*)c(?P<value>)",
                    "value_parser": {"name": "int"},
                },
            },
            "<t>" + "ab" * 40 + "dc</t>",
        ),
    ],
)
def test_a_search_without_an_end_ends_the_reply_and_makes_no_other_text_of_it(
    field: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reply says must not depend on how fast the machine is."""
    for module in ("response_template", "template_calls"):
        monkeypatch.setattr(f"engine.replies.{module}.PATIENCE", 0.05)
    parser = TemplateParser(ResponseTemplate({"start_anchor": "A:", "fields": {"tool_calls": field}}), READ)
    with pytest.raises(ReplyFault, match="tool_calls"):
        parser.push(text)


def test_a_prompt_whose_opening_is_not_found_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("response_template", "template_calls"):
        monkeypatch.setattr(f"engine.replies.{module}.PATIENCE", 0.05)
    template = ResponseTemplate({"start_anchor_pattern": "(?:a|b|ab)*c", "fields": {"content": {}}})
    with pytest.raises(InvalidFormat, match="start of the reply"):
        template.opening("ab" * 40 + "dc")


def test_the_history_is_written_as_the_chat_template_takes_it(shared: Path) -> None:
    """A response template says how replies are read; earlier calls are still shown in the form of the chat template."""
    for family, between in (("meta-llama", None), ("Mistral", ", ")):
        [file] = (shared / "chat_templates").glob(f"*{family}*")
        template = ChatTemplate(file.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
        own, read_by = find_chat_format(template), find_chat_format(template, given=MARKED)
        assert own.template_format == read_by.template_format == own.tool_format
        assert read_by.template_format is not None
        assert read_by.template_format.between == between
        assert read_by.tool_format != own.tool_format


def test_two_results_with_one_id_are_both_shown() -> None:
    call = ToolCall("x", "ping", "{}")
    turn = ChatMessage("assistant", "", tool_calls=(call, call))
    one, two = (ChatMessage("tool", text, tool_call_id="x") for text in ("one", "two"))
    assert [m.content for m in one_call_a_turn([turn, one, two])] == ["", "one", "", "two"]


def test_a_turn_with_several_calls_becomes_several() -> None:
    one, two = ToolCall("a", "ping", "{}"), ToolCall("b", "ping", "{}")
    first, second = (ChatMessage("tool", name, tool_call_id=name) for name in "ab")
    turn = ChatMessage("assistant", "Let me.", reasoning_content="hm", tool_calls=(one, two))
    ask, end = ChatMessage("user", "?"), ChatMessage("assistant", "!")
    assert one_call_a_turn([ask, turn, second, first, end]) == [
        ask,
        ChatMessage("assistant", "Let me.", reasoning_content="hm", tool_calls=(one,)),
        first,
        ChatMessage("assistant", "", tool_calls=(two,)),
        second,
        end,
    ]
    assert one_call_a_turn([ask, end]) == [ask, end]


# -- with a model -----------------------------------------------------------------------------------------------------

HELLO = [ChatMessage("user", "Hello")]
WEATHER_TOOL = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rio"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
HARMONY = (
    "{# <|channel|>analysis<|message|> functions. #}{% for m in messages %}<|start|>{{ m.role }}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
)


@pytest.fixture(scope="module")
def harmony(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model whose thoughts, calls and answers are turns of their own."""
    template = tmp_path_factory.mktemp("template") / "harmony.jinja"
    template.write_text(HARMONY)
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=512, chat_template=template)


@pytest.mark.parametrize("choice", [ToolChoice("required"), ToolChoice("function", "get_weather")])
def test_calls_can_be_asked_for_in_channels(harmony: LLM, choice: ToolChoice) -> None:
    for seed in range(3):
        [answer] = harmony.generate(
            HELLO, tools=[WEATHER_TOOL], tool_choice=choice, thinking_budget=9, seed=seed, max_tokens=400
        )
        [call] = answer.tool_calls
        assert (call.name, answer.text, answer.finish_reason) == ("get_weather", "", "tool_calls")
        assert json.loads(call.arguments)["city"] in ("Oslo", "Rio")


def test_an_answer_in_channels_is_held_to_its_schema(harmony: LLM) -> None:
    thoughts = set()
    for seed in range(4):
        [answer] = harmony.generate(
            HELLO, constraint=Constraint("json", {"enum": [1, 2]}), thinking_budget=9, seed=seed, max_tokens=200
        )
        assert (answer.text in ("1", "2"), answer.finish_reason) == (True, "stop")
        thoughts.add(answer.reasoning)
    assert len(thoughts) > 1


@pytest.fixture(scope="module")
def shipped(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer brings a response template along."""
    folder = tmp_path_factory.mktemp("shipped") / "model"
    shutil.copytree(tiny("qwen3"), folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "response_template": PARAMETERS}))
    return folder


def test_a_template_that_the_tokenizer_brings_along(shipped: Path) -> None:
    llm = LLM(shipped, cache_size="32MiB", context_length=512)
    assert llm.engine.model.info.tool_calls_source == "tokenizer"
    text = (
        "<think>hm</think>Yes.<tool_call><function=get_weather><parameter=city>Rio</parameter></function></tool_call>"
    )
    answer = forced_reply(llm, text, [WEATHER_TOOL])
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("hm", "Yes.", "tool_calls")
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("get_weather", '{"city": "Rio"}')]
    with pytest.raises(InvalidParameter, match="response template"):
        llm.generate(HELLO, tools=[WEATHER_TOOL], tool_choice=ToolChoice("required"), seed=1)


def test_models_yaml_names_a_template(shipped: Path, tmp_path: Path) -> None:
    file = tmp_path / "reply.json"
    file.write_text(json.dumps(MARKED))
    llm = LLM(shipped, cache_size="32MiB", context_length=512, response_template=file)
    assert llm.engine.model.info.tool_calls_source == "models.yaml"
    [answer] = llm.generate(HELLO, tools=[WEATHER_TOOL], tool_choice=ToolChoice("required"), seed=1, max_tokens=200)
    assert {c.name for c in answer.tool_calls} == {"get_weather"}
    file.write_text("{}")
    with pytest.raises(LoadError, match=r"reply\.json is no response template"):
        LLM(shipped, cache_size="32MiB", context_length=512, response_template=file)
    with pytest.raises(LoadError, match=r"nowhere\.json"):
        LLM(shipped, cache_size="32MiB", context_length=512, response_template=tmp_path / "nowhere.json")

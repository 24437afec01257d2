"""What is unambiguous is taken: one table of what peers and models send, and what the engine is asked for.

Beside it the other half of the rule: what could mean two things, or would be ignored, is refused by name.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import chat, complete

from engine import ChatMessage, Constraint, GenerationRequest, SamplingParams, ToolCall, ToolChoice, VerbatimError
from server import json_text
from server.api import chat_request
from server.api.completions import request as completion_request
from server.api.parsing import ParsedRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
GBNF = 'root ::= "yes" | "no"\n'
LARK = 'start: "yes" | "no"\n'
HELLO = {"role": "user", "content": "Hi"}


def parse(body: dict[str, Any] | str) -> ParsedRequest:
    return chat_request.parse((body if isinstance(body, str) else json.dumps(body)).encode(), "chatcmpl-1")


def asked(**fields: Any) -> GenerationRequest:
    [generation] = parse(chat(**fields)).generations
    return generation


def refused(body: dict[str, Any], read: Any = chat_request.parse) -> tuple[str, str | None]:
    with pytest.raises(VerbatimError) as caught:
        read(json.dumps(body).encode(), "r")
    return caught.value.code, caught.value.param


# -- numbers -----------------------------------------------------------------------------------------------------------

NUMBERS = [
    # field, what is sent, what the engine runs with
    ("max_tokens", 16.0, 16),
    ("max_completion_tokens", 16.0, 16),
    ("max_tokens", -1, None),
    ("max_completion_tokens", -1.0, None),
    ("max_tokens", 0, 0),
    ("seed", 7.0, 7),
    ("seed", -(2.0**53), -(2**53)),
    ("n", 1.0, 1),
    ("top_k", -1, 0),
    ("top_k", -1.0, 0),
    ("top_k", 40.0, 40),
    ("top_logprobs", 5.0, 5),
    ("stop_token_ids", [3.0, 1], (1, 3)),
    ("temperature", 1, 1.0),
]


@pytest.mark.parametrize(("name", "sent", "meant"), NUMBERS)
def test_a_number_is_what_it_says(name: str, sent: Any, meant: Any) -> None:
    params = SamplingParams.merged(asked(**{name: sent}, logprobs=True).sampling)
    found = getattr(params, "max_tokens" if name == "max_completion_tokens" else name)
    assert (found, type(found)) == (meant, type(meant))


@pytest.mark.parametrize("name", ["max_tokens", "seed", "n", "top_k", "top_logprobs", "min_tokens"])
@pytest.mark.parametrize("value", [1.5, 1e300, 2.0**53 + 2, True, "1"])
def test_no_other_number_is_an_integer(name: str, value: Any) -> None:
    assert refused(chat(**{name: value})) == ("invalid_format", name)


def test_the_later_name_takes_the_limit_off() -> None:
    assert asked(max_tokens=5, max_completion_tokens=-1).sampling == {"max_tokens": None}


def test_a_completion_without_a_limit_is_longer_than_one_without_a_word() -> None:
    def limit(**fields: Any) -> Any:
        return (
            completion_request.parse(json.dumps(complete(**fields)).encode(), "r").generations[0].sampling["max_tokens"]
        )

    assert [limit(), limit(max_tokens=None), limit(max_tokens=-1), limit(max_tokens=0)] == [16, 16, None, 0]


def test_token_ids_may_be_written_with_a_point() -> None:
    [one] = completion_request.parse(json.dumps(complete(prompt=[1.0, 2])).encode(), "r").generations
    assert one.prompt_token_ids == (1, 2)
    assert refused(complete(prompt=[1.0, 2.5]), completion_request.parse) == ("invalid_format", "prompt.1")


# -- turns -------------------------------------------------------------------------------------------------------------


def turn(arguments: Any = "{}", name: str = "f", **fields: Any) -> dict[str, Any]:
    function = {"name": name, **({} if arguments is ... else {"arguments": arguments})}
    return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}], **fields}


def tool(**fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c", **fields}


TURNS = [
    # messages after the first, the content of the last
    ([{"role": "assistant", "content": None}], ""),
    ([{"role": "assistant"}], ""),
    ([{"role": "assistant", "content": ""}], ""),
    ([{"role": "assistant", "content": []}], ""),
    ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
    ([{"role": "assistant", "content": None, "reasoning_content": "Hm."}], ""),
    ([turn(content=None)], ""),
    ([turn(content=[])], ""),
    ([turn(), tool(content=None)], ""),
    ([turn(), tool(content=[])], ""),
    ([turn(), tool()], ""),
    ([turn(), tool(content=[{"type": "text", "text": "a"}])], "a"),
]


@pytest.mark.parametrize(("turns", "content"), TURNS)
def test_a_turn_without_content_is_an_empty_one(turns: list[Any], content: str) -> None:
    request = parse(chat(messages=[HELLO, *turns]))
    assert request.ignored == ()
    *_, last = request.generations[0].messages or ()
    assert last.content == content


@pytest.mark.parametrize("role", ["system", "developer", "user"])
@pytest.mark.parametrize("fields", [{}, {"content": None}, {"content": []}])
def test_whoever_speaks_to_the_model_says_something(role: str, fields: dict[str, Any]) -> None:
    assert refused(chat(messages=[{"role": role, **fields}]))[1] == "messages.0.content"


ARGUMENTS = [
    # as they are sent, as the engine gets them
    ('{"a": 1}', '{"a": 1}'),
    ('{"a": "half', '{"a": "half'),
    ("not JSON", "not JSON"),
    ("[]", "[]"),
    ("3", "3"),
    ("", "{}"),
    (None, "{}"),
    (..., "{}"),
    ({"a": "é\u2028"}, '{"a":"é\\u2028"}'),
    ({}, "{}"),
    ("[" * 1000, "[" * 1000),
]


@pytest.mark.parametrize(("sent", "text"), ARGUMENTS, ids=lambda v: str(v)[:20])
def test_arguments_are_what_the_model_wrote(sent: Any, text: str) -> None:
    [_, message] = asked(messages=[HELLO, turn(sent)]).messages or ()
    assert message == ChatMessage("assistant", "", tool_calls=(ToolCall("c", "f", text),))


def test_arguments_that_are_no_json_hide_no_others_from_the_count() -> None:
    """A quote that is missing in one call must not make a text of the next call's thousand lists."""
    many = "[" + "1," * (json_text.MAX_VALUES + 1) + "1]"
    assert refused(chat(messages=[turn('{"a'), turn(many)])) == ("invalid_parameter", "messages")
    text = json.dumps({"a": ",{[" * json_text.MAX_VALUES})
    assert asked(messages=[turn('{"a'), turn(text)]).messages


NAMES = ["f", "f" * 128, "fs.read/all", "a-b_c.d/e", "mcp/server.tool"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_the_characters_of_paths(name: str) -> None:
    tools = [{"type": "function", "function": {"name": name}}]
    choice = {"type": "function", "function": {"name": name}}
    request = asked(messages=[HELLO, turn(name=name)], tools=tools, tool_choice=choice)
    assert (request.tools[0].name, request.tool_choice.name) == (name, name)
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMA}}
    assert asked(response_format=form).constraint


@pytest.mark.parametrize("name", ["", "f" * 129, "a b", "a:b", 'a"b', "a\n", "ä", "a\\b"])
def test_no_other_name_is_taken(name: str) -> None:
    assert refused(chat(tools=[{"type": "function", "function": {"name": name}}]))[1] == "tools.0.function.name"
    assert refused(chat(messages=[turn(name=name)]))[1] == "messages.0.tool_calls.0.function.name"
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMA}}
    assert refused(chat(response_format=form))[1] == "response_format.json_schema.name"


# -- forms in other dialects -------------------------------------------------------------------------------------------


def named(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": SCHEMA, **fields}}


ANY = {"type": "object"}
FORMS: list[tuple[dict[str, Any], Constraint | None]] = [
    ({"response_format": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object", "schema": None}}, Constraint("json", ANY)),
    ({"response_format": named()}, Constraint("json", SCHEMA, False, "response_format.json_schema.schema")),
    ({"response_format": named(name=None)}, Constraint("json", SCHEMA, False, "response_format.json_schema.schema")),
    (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        Constraint("json", SCHEMA, False, "response_format.schema"),
    ),
    (
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        Constraint("json", SCHEMA, False, "response_format.schema"),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, Constraint("json", SCHEMA, True, "structured_outputs.json")),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Constraint("json", SCHEMA, True, "structured_outputs.json")),
    ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+", True, "structured_outputs.regex")),
    ({"structured_outputs": {"choice": ["a"]}}, Constraint("choice", ["a"], True, "structured_outputs.choice")),
    ({"structured_outputs": {"grammar": LARK}}, Constraint("grammar", LARK, True, "structured_outputs.grammar")),
    ({"structured_outputs": {"grammar": GBNF}}, Constraint("gbnf", GBNF, True, "structured_outputs.grammar")),
    ({"structured_outputs": {"json_object": True}}, Constraint("json", ANY, True, "structured_outputs.json_object")),
    ({"structured_outputs": {"regex": "a", "json": None, "json_object": False, "disable_any_whitespace": False}},
     Constraint("regex", "a", True, "structured_outputs.regex")),
    ({"structured_outputs": {}}, None),
    ({"structured_outputs": None}, None),
    ({"guided_json": SCHEMA}, Constraint("json", SCHEMA, True, "guided_json")),
    ({"guided_grammar": LARK}, Constraint("grammar", LARK, True, "guided_grammar")),
    ({"guided_grammar": f"# is\n  {GBNF}"}, Constraint("gbnf", f"# is\n  {GBNF}", True, "guided_grammar")),
    ({"json_schema": SCHEMA}, Constraint("json", SCHEMA, False, "json_schema")),
    ({"json_schema": json.dumps(SCHEMA)}, Constraint("json", SCHEMA, False, "json_schema")),
    ({"grammar": GBNF}, Constraint("gbnf", GBNF, True, "grammar")),
    ({"grammar": f"%llguidance {{}}\n{LARK}"}, Constraint("grammar", f"%llguidance {{}}\n{LARK}", True, "grammar")),
    ({"regex": "[ab]"}, Constraint("regex", "[ab]", True, "regex")),
    ({"ebnf": GBNF}, Constraint("gbnf", GBNF, True, "ebnf")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "form"), FORMS, ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else "")
def test_a_form_is_honoured_in_every_dialect(fields: dict[str, Any], form: Constraint | None) -> None:
    request = parse(chat(**fields))
    assert request.generations[0].constraint == form
    assert request.ignored == ()
    [plain] = completion_request.parse(json.dumps(complete(**fields)).encode(), "r").generations
    assert plain.constraint == form


NO_FORMS = [
    ({"guided_regex": "a", "regex": "a"}, "invalid_parameter", "regex"),
    ({"response_format": {"type": "json_object"}, "grammar": GBNF}, "invalid_parameter", "grammar"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "invalid_parameter", "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "x"}}, "unsupported_parameter", "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "unsupported_parameter",
     "structured_outputs.whitespace_pattern"),
    ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}}, "unsupported_parameter",
     "structured_outputs.disable_any_whitespace"),
    ({"structured_outputs": {"json": "{"}}, "invalid_parameter", "structured_outputs.json"),
    ({"structured_outputs": {"json": 3}}, "invalid_format", "structured_outputs.json"),
    ({"structured_outputs": {"choice": "a"}}, "invalid_format", "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "invalid_format", "structured_outputs.choice.1"),
    ({"structured_outputs": {"regex": ""}}, "invalid_parameter", "structured_outputs.regex"),
    ({"structured_outputs": {"json_object": 1}}, "invalid_format", "structured_outputs.json_object"),
    ({"guided_whitespace_pattern": " ?"}, "unsupported_parameter", "guided_whitespace_pattern"),
    ({"response_format": {**named(), "schema": SCHEMA}}, "invalid_parameter", "response_format.schema"),
    ({"response_format": {"type": "json_object", "schema": "{}"}}, "invalid_format", "response_format.schema"),
    ({"json_schema": "[]"}, "invalid_format", "json_schema"),
    ({"grammar": ""}, "invalid_parameter", "grammar"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "code", "param"), NO_FORMS, ids=lambda v: json.dumps(v)[:60])
def test_two_forms_or_half_a_one_are_refused(fields: dict[str, Any], code: str, param: str) -> None:
    assert refused(chat(**fields)) == (code, param)


def test_what_is_beside_a_form_is_named() -> None:
    for form, names in (
        ({"type": "text", "schema": SCHEMA}, ("response_format.schema",)),
        ({"type": "json_object", "json_schema": {"name": "a"}}, ("response_format.json_schema",)),
        ({"type": "json_object", "more": 1}, ("response_format.more",)),
    ):
        assert parse(chat(response_format=form)).ignored == names
    assert parse(chat(structured_outputs={"regex": "a", "backend": "x"})).ignored == ("structured_outputs.backend",)
    assert parse(chat(guided_decoding_backend="xgrammar")).ignored == ("guided_decoding_backend",)


# -- allowed tools -----------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("a", "b", "c.d/e")]


def allowed(mode: Any = "auto", tools: Any = TOOLS[:1], **more: Any) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools, **more}}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_all_tools_are_shown_and_some_may_be_called(mode: Any) -> None:
    request = asked(tools=TOOLS, tool_choice=allowed(mode, TOOLS[1:]))
    assert [tool.name for tool in request.tools] == ["a", "b", "c.d/e"]
    assert request.tool_choice == ToolChoice(mode, allowed=("b", "c.d/e"))


CHOICES = [
    (allowed("none"), "invalid_parameter", "tool_choice.allowed_tools.mode"),
    (allowed(None), "invalid_format", "tool_choice.allowed_tools.mode"),
    (allowed(tools=[]), "invalid_parameter", "tool_choice.allowed_tools.tools"),
    (allowed(tools={}), "invalid_format", "tool_choice.allowed_tools.tools"),
    (allowed(tools=["a"]), "invalid_format", "tool_choice.allowed_tools.tools.0"),
    (allowed(tools=[*TOOLS[:1], {"type": "function", "function": {"name": "z"}}]), "invalid_parameter",
     "tool_choice.allowed_tools.tools.1.function.name"),
    (allowed(tools=[{"type": "mcp", "server_label": "x"}]), "unsupported_parameter",
     "tool_choice.allowed_tools.tools.0.type"),
    ({"type": "allowed_tools"}, "missing_field", "tool_choice.allowed_tools"),
    ({"type": "custom", "custom": {"name": "a"}}, "unsupported_parameter", "tool_choice.type"),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "code", "param"), CHOICES)
def test_a_list_of_allowed_tools_is_read_strictly(choice: Any, code: str, param: str) -> None:
    assert refused(chat(tools=TOOLS, tool_choice=choice)) == (code, param)


def test_what_else_stands_in_a_list_of_allowed_tools_is_named() -> None:
    request = parse(chat(tools=TOOLS, tool_choice=allowed(more=1)))
    assert request.ignored == ("tool_choice.allowed_tools.more",)


# -- values that ask for what happens anyway ---------------------------------------------------------------------------

NEUTRAL: list[dict[str, Any]] = [
    {"verbosity": "medium"},
    {"parallel_tool_calls": True},
    {"parallel_tool_calls": False},
    {"stop": []},
    {"tools": []},
    {"functions": None},
    {"n": None},
    {"logit_bias": {}},
    {"user": 17},
    {"metadata": {"a": 1, "b": None, "c": ["x"]}},
    {"service_tier": "auto"},
    {"stream_options": None},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda v: next(iter(v)))
def test_what_changes_nothing_is_taken(fields: dict[str, Any]) -> None:
    assert parse(chat(**fields)).ignored == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"verbosity": "low"},
        {"thinking": {"type": "enabled"}},
        {"store": True},
        {"service_tier": "flex"},
        {"echo": True},
    ],
    ids=lambda v: next(iter(v)),
)
def test_what_would_change_something_is_refused(fields: dict[str, Any]) -> None:
    assert refused(chat(**fields)) == ("unsupported_parameter", next(iter(fields)))

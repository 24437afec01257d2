"""`POST /responses`, over an engine that follows a script: what is asked, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, call
from fakes import FakeEngine, Step, make_app, output, word_by_word
from openai.types.responses import Response
from response_events import collected, read

from engine import (
    ChatMessage,
    ChoiceDelta,
    ContextLengthExceeded,
    GenerationRequest,
    InvalidParameter,
    PreparedRequest,
    Tool,
    ToolCall,
    ToolChoice,
)
from server.api import openapi
from server.api.fields import SAMPLING
from server.api.responses.fields import RESPONSES
from server.api.responses.request import parse
from server.api.responses.thoughts import packed_thoughts, unpacked_thoughts

PATH = "/v1/responses"
RECORDED = json.loads((Path(__file__).parent / "recorded" / "responses.json").read_text())
PING = {"type": "function", "name": "ping", "parameters": {"type": "object"}}
NET = {"type": "namespace", "name": "net", "description": "", "tools": [PING, {"type": "function", "name": "trace"}]}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "input": "Hi", **fields}


def ask(engine: FakeEngine | None = None, **fields: Any) -> Answer:
    return call(make_app(engine or FakeEngine()), body(**fields), path=PATH)


def asked(**fields: Any) -> GenerationRequest:
    [generation] = parse(json.dumps(body(**fields)).encode(), "resp_1").generations
    return generation


def item(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


# -- the shape --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_a_response(prefix: str) -> None:
    answer = call(make_app(), body(metadata={"a": "b"}, user="u"), path=prefix + PATH)
    assert answer.status == 200
    found = dict(answer.json)
    suffix = found.pop("id").removeprefix("resp_")
    assert found.pop("created_at") > 1e9
    part = {"type": "output_text", "text": "Hello wörld!", "annotations": [], "logprobs": []}
    message = {"id": f"msg_{suffix}_0", "type": "message", "status": "completed", "role": "assistant"}
    assert found == {
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "model": "fake",
        "output": [{**message, "content": [part]}],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 0.7,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 9,
        },
        "metadata": {"a": "b"},
        "user": "u",
        "system_fingerprint": "fp_fake",
        "seed": 77,
    }
    assert Response.model_validate(answer.json).output_text == "Hello wörld!"


FIELDS: list[dict[str, Any]] = [
    {},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"return_token_ids": True, "margins": True, "prompt_logprobs": 1},
    {"instructions": "Be brief.", "tools": [PING, NET], "tool_choice": {"type": "function", "name": "ping"}},
    {"text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low", "summary": "auto"}},
    {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": False}, "verbosity": None}},
    {"tools": [PING], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [PING]}},
    {"metadata": {"a": "b"}, "user": "u", "prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto"},
    {"parallel_tool_calls": False, "max_output_tokens": 20, "max_tool_calls": 3, "temperature": 0, "top_p": 0.5},
    {"tools": [PING, NET], "tool_choice": {"type": "function", "namespace": "net", "name": "trace"}},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: ",".join(fields) or "none")
def test_a_stream_is_the_whole_answer_and_both_are_what_the_sdk_reads(fields: dict[str, Any]) -> None:
    whole = ask(**fields)
    assert whole.status == 200, whole.body
    Response.model_validate(whole.json)
    streamed = ask(**fields, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    last = collected(read(streamed.body))

    def bare(response: dict[str, Any]) -> Any:
        return json.loads(json.dumps(response).replace(response["id"].removeprefix("resp_"), "ID"))

    assert {**bare(last), "created_at": 0} == {**bare(whole.json), "created_at": 0}


def test_log_probabilities_are_at_the_text() -> None:
    for fields in ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}):
        [message] = ask(**fields).json["output"]
        entries = message["content"][0]["logprobs"]
        assert [entry["token"] for entry in entries] == ["Hel", "lo", " wörld", "!"]
        assert [len(entry["top_logprobs"]) for entry in entries] == [fields.get("top_logprobs", 0)] * 4


def test_thoughts_come_back_in_whatever_form_a_client_keeps() -> None:
    for text in ("", "Let me think.\n", "é\u2028🤷"):
        assert unpacked_thoughts(packed_thoughts(text)) == text
    for other in ("", "gAAAAABo", "verbatim-text:é", "verbatim-text:a", "verbatim-text:/w=="):
        assert unpacked_thoughts(other) is None


# -- what the engine is told ------------------------------------------------------------------------------------------

SAYS = {"role": "user", "content": "Hi"}
THINKS = item("reasoning", id="rs_1", summary=[], content=[{"type": "reasoning_text", "text": "hm"}])
CALLS = item("function_call", id="fc_1", call_id="c1", name="ping", arguments='{"a":1}', status="completed")
CALLS_TOO = item("function_call", call_id="c2", namespace="net", name="trace", arguments="")
ANSWERS = item("function_call_output", call_id="c1", output="pong")
PARTS = item("function_call_output", call_id="c2", output=[{"type": "input_text", "text": t} for t in "xy"])
PROMISES = item(
    "message", id="msg_1", role="assistant", status="completed", content=[
        {"type": "output_text", "text": "I", "annotations": [], "logprobs": []}, {"type": "output_text", "text": "'ll"}
    ],
)  # fmt: skip
ONE = ToolCall("c1", "ping", '{"a":1}')
TWO = ToolCall("c2", "net.trace", "{}")
USER = ChatMessage("user", "Hi")
CONVERSATIONS: list[tuple[Any, list[ChatMessage]]] = [
    ("Hi", [USER]),
    ("", [ChatMessage("user", "")]),
    ([SAYS], [USER]),
    ([{**SAYS, "type": "message"}], [USER]),
    ([{"role": "user", "content": [{"type": "input_text", "text": "H"}, {"type": "text", "text": "i"}]}], [USER]),
    ([{"role": "user", "content": []}], [ChatMessage("user", "")]),
    ([SAYS, SAYS], [ChatMessage("user", "Hi\n\nHi")]),
    (
        [SAYS, THINKS, PROMISES, CALLS, CALLS_TOO, ANSWERS, PARTS],
        [
            USER,
            ChatMessage("assistant", "I'll", None, "hm", (ONE, TWO)),
            ChatMessage("tool", "pong", tool_call_id="c1"),
            ChatMessage("tool", "xy", tool_call_id="c2"),
        ],
    ),
    ([SAYS, CALLS, PROMISES, ANSWERS], [USER, ChatMessage("assistant", "I'll", None, None, (ONE,)),
                                        ChatMessage("tool", "pong", tool_call_id="c1")]),
    ([SAYS, PROMISES, PROMISES], [USER, ChatMessage("assistant", "I'll\n\nI'll")]),
    ([SAYS, THINKS, THINKS, PROMISES], [USER, ChatMessage("assistant", "I'll", None, "hmhm")]),
    ([SAYS, PROMISES, THINKS], [USER, ChatMessage("assistant", "I'll", None, "hm")]),
    ([SAYS, PROMISES, THINKS, PROMISES], [USER, ChatMessage("assistant", "I'llI'll", None, "hm")]),
    ([SAYS, CALLS, THINKS, PROMISES], [USER, ChatMessage("assistant", "I'll", None, "hm", (ONE,))]),
    ([SAYS, PROMISES, CALLS, THINKS, CALLS_TOO, PROMISES],
     [USER, ChatMessage("assistant", "I'll\n\nI'll", None, "hm", (ONE, TWO))]),
    ([SAYS, item("reasoning", summary=[], encrypted_content=packed_thoughts("hm"))],
     [USER, ChatMessage("assistant", "", None, "hm")]),
    ([SAYS, {**THINKS, "encrypted_content": "of another server"}], [USER, ChatMessage("assistant", "", None, "hm")]),
    ([SAYS, item("message", role="assistant", content=[{"type": "refusal", "refusal": "No."}])],
     [USER, ChatMessage("assistant", "No.")]),
    (
        [{"role": "developer", "content": "A."}, {"role": "system", "content": "B."}, SAYS,
         {"role": "developer", "content": "C."}],
        [ChatMessage("developer", "A.\n\nB."), USER, ChatMessage("developer", "C.")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "messages"), CONVERSATIONS, ids=lambda value: json.dumps(value, default=str)[:60])
def test_items_become_messages(given: Any, messages: list[ChatMessage]) -> None:
    assert list(asked(input=given).messages or ()) == messages
    system = asked(input=given, instructions="Be brief.").messages or ()
    assert system[0].role == "system"
    assert (system[0].content or "").startswith("Be brief.")
    assert system[-1] == messages[-1]


def test_a_response_goes_back_as_it_came() -> None:
    """Items of a reply, sent on: nothing is refused, nothing is ignored."""
    first = ask(include=["reasoning.encrypted_content", "message.output_text.logprobs"]).json["output"]
    engine = FakeEngine()
    answer = ask(engine, input=[SAYS, THINKS, *first, CALLS, ANSWERS])
    assert answer.status == 200
    assert "x-ignored-fields" not in answer.headers
    assert (engine.requests[-1].messages or ())[1].content == "Hello wörld!"


@pytest.mark.parametrize("thinks_again", [False, True])
def test_a_reply_goes_back_as_the_turn_that_it_was(thinks_again: bool) -> None:
    """A template that sees two turns, or other words, writes another prompt, and nothing is found in the cache."""

    def replies(request: PreparedRequest) -> Iterable[Step]:
        deltas = [ChoiceDelta(0, "", (1,), reasoning="Hm."), ChoiceDelta(0, "One", (2,))]
        if thinks_again:
            deltas += [ChoiceDelta(0, "", (3,), reasoning="So."), ChoiceDelta(0, ", two", (4,))]
        deltas.append(ChoiceDelta(0, "", (5,), None, "tool_calls", tool_calls=(ONE, dataclasses.replace(ONE, id="c2"))))
        for i, delta in enumerate(deltas):
            yield output(request, [delta], i + 1, finished=i == len(deltas) - 1)

    reply = ask(FakeEngine(replies), tools=[PING]).json["output"]
    [_, turn, _] = asked(input=[SAYS, *reply, ANSWERS]).messages or ()
    assert (turn.content, turn.reasoning_content) == (("One, two", "Hm.So.") if thinks_again else ("One", "Hm."))
    assert [call.id for call in turn.tool_calls] == ["c1", "c2"]


GIVEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0}, {"temperature": 0}),
    ({"max_output_tokens": 5}, {"max_tokens": 5}),
    ({"seed": 7, "top_k": 4, "stop": ["x"]}, {"seed": 7, "top_k": 4, "stop": ["x"]}),
    ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
    ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"top_logprobs": 0}, {"top_logprobs": 0}),
    ({"include": ["reasoning.encrypted_content", "file_search_call.results"]}, {}),
]


@pytest.mark.parametrize(("fields", "given"), GIVEN, ids=lambda value: json.dumps(value)[:40])
def test_sampling(fields: dict[str, Any], given: dict[str, Any]) -> None:
    assert asked(**fields).sampling == given


def test_null_is_not_given() -> None:
    nulls = dict.fromkeys([*RESPONSES.honoured, *RESPONSES.refused])
    request = parse(json.dumps({**nulls, **body()}).encode(), "resp_1")
    assert request.generations[0].sampling == {}
    assert request.ignored == ()
    assert not request.stream


ping, trace = Tool("ping", parameters={"type": "object"}), Tool("net.trace")
net_ping = Tool("net.ping", parameters={"type": "object"})
CHOICES: list[tuple[Any, tuple[Tool, ...], ToolChoice]] = [
    (None, (ping, net_ping, trace), ToolChoice()),
    ("auto", (ping, net_ping, trace), ToolChoice()),
    ("none", (), ToolChoice()),
    ("required", (ping, net_ping, trace), ToolChoice("required")),
    ({"type": "function", "name": "ping"}, (ping, net_ping, trace), ToolChoice("function", "ping")),
    ({"type": "function", "name": "trace", "namespace": "net"}, (ping, net_ping, trace),
     ToolChoice("function", "net.trace")),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "ping"}]},
     (ping, net_ping, trace), ToolChoice("auto", allowed=("ping",))),
    ({"type": "allowed_tools", "mode": "required", "tools": [{**PING, "namespace": "net"}]}, (ping, net_ping, trace),
     ToolChoice("required", allowed=("net.ping",))),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "tools", "told"), CHOICES, ids=lambda value: str(value)[:50])
def test_tools(choice: Any, tools: tuple[Tool, ...], told: ToolChoice) -> None:
    request = asked(tools=[PING, NET], tool_choice=choice)
    assert (request.tools, request.tool_choice) == (tools, told)


@pytest.mark.parametrize(
    ("given", "told"), [({"a": 1}, '{"a": 1}'), (None, "{}"), ("", "{}"), ('{"a": ', '{"a": '), ("[]", "[]")]
)
def test_arguments_of_earlier_calls_are_those_of_a_chat(given: Any, told: str) -> None:
    """Models write texts that are no JSON; the conversation goes on."""
    [call] = asked(input=[{**CALLS, "arguments": given}, {"role": "user", "content": "?"}]).messages[0].tool_calls
    assert call.arguments.replace(" ", "") == told.replace(" ", "")


def test_forms_and_options() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    constraint = asked(text={"format": form}).constraint
    assert constraint is not None
    assert (constraint.kind, constraint.value, constraint.strict, constraint.param) == (
        "json", schema, True, "text.format.schema",
    )  # fmt: skip
    for text in ({}, {"format": None}, {"format": {"type": "text"}, "verbosity": "medium"}):
        assert asked(text=text).constraint is None
    guided = asked(guided_regex="a+", text={"format": {"type": "text"}}).constraint
    assert guided is not None
    assert guided.kind == "regex"
    request = asked(reasoning={"effort": "high", "summary": "auto"}, parallel_tool_calls=False, cache_salt="s")
    assert (request.reasoning_effort, request.parallel_tool_calls, request.cache_salt) == ("high", False, "s")


# -- what is ignored, what is refused ---------------------------------------------------------------------------------

IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"unknown": 1}, "unknown"),
    ({"input": [{**SAYS, "phase": "final_answer"}]}, "input.0.phase"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "b": 1}]}]}, "input.0.content.0.b"),
    ({"input": [SAYS, {**THINKS, "summary": [{"type": "summary_text", "text": "x"}]}]}, "input.1.summary"),
    ({"text": {"other": 1}}, "text.other"),
    ({"text": {"format": {"type": "text", "other": 1}}}, "text.format.other"),
    ({"reasoning": {"other": 1}}, "reasoning.other"),
    ({"tools": [{**PING, "other": 1}]}, "tools.0.other"),
    ({"tools": [{**NET, "description": "Nets."}]}, "tools.0.description"),
    ({"tools": [PING], "tool_choice": {"type": "function", "name": "ping", "other": 1}}, "tool_choice.other"),
]


@pytest.mark.parametrize(("fields", "name"), IGNORED, ids=lambda value: str(value)[:50])
def test_what_is_ignored_is_named(fields: dict[str, Any], name: str) -> None:
    assert ask(**fields).headers["x-ignored-fields"] == name


def content(kind: str) -> dict[str, Any]:
    return {"input": [SAYS, {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": kind}]}]}


def form(**fields: Any) -> dict[str, Any]:
    return {"text": {"format": {"type": "json_schema", **fields}}}


HOSTED = ("web_search", "file_search", "computer_use_preview", "mcp", "code_interpreter", "image_generation",
          "local_shell", "custom", "tool_search", "shell", "apply_patch")  # fmt: skip
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"input": None}, 400, "input"),
    ({"input": 1}, 400, "input"),
    ({"input": []}, 422, "input"),
    ({"input": ["Hi"]}, 400, "input.0"),
    ({"input": [{"content": "Hi"}]}, 400, "input.0.role"),
    ({"input": [{"role": "tool", "content": "Hi"}]}, 422, "input.0.role"),
    ({"input": [{"role": "user"}]}, 400, "input.0.content"),
    ({"input": [{"role": "user", "content": 1}]}, 400, "input.0.content"),
    ({"input": [{"role": "user", "content": [1]}]}, 400, "input.0.content.0"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, 400, "input.0.content.0.text"),
    *((content(kind), 422, "input.1.content.1.type") for kind in ("input_image", "input_file", "input_audio", "x")),
    *(({"input": [SAYS, item(kind, id="a")]}, 422, "input.1.type") for kind in (
        "item_reference", "custom_tool_call", "computer_call", "web_search_call", "mcp_call", "compaction", "x", "")),
    ({"input": [{**CALLS, "call_id": ""}]}, 422, "input.0.call_id"),
    ({"input": [{**CALLS, "name": "a b"}]}, 422, "input.0.name"),
    ({"input": [{**CALLS, "namespace": "a b"}]}, 422, "input.0.namespace"),
    ({"input": [{**CALLS, "arguments": 5}]}, 400, "input.0.arguments"),
    ({"input": [SAYS, ANSWERS]}, 422, "input.1.call_id"),
    ({"input": [SAYS, CALLS, {**ANSWERS, "output": {}}]}, 400, "input.2.output"),
    ({"input": [item("reasoning", encrypted_content="gAAAA")]}, 422, "input.0.encrypted_content"),
    ({"input": [item("reasoning", content=[{"type": "summary_text", "text": "a"}])]}, 422, "input.0.content.0.type"),
    *(({"tools": [PING, {"type": kind}]}, 422, "tools.1.type") for kind in HOSTED),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, 422, "tools.0.name"),
    ({"tools": [PING, {**PING}]}, 422, "tools.1.name"),
    ({"tools": [{**NET, "tools": [PING, {"type": "custom", "name": "a"}]}]}, 422, "tools.0.tools.1.type"),
    ({"tools": [{**NET, "tools": [PING, {**PING, "parameters": 1}]}]}, 400, "tools.0.tools.1.parameters"),
    ({"tools": [{**PING, "defer_loading": True}]}, 422, "tools.0.defer_loading"),
    ({"tools": [PING] * 129}, 422, "tools"),
    ({"tool_choice": "required"}, 422, "tool_choice"),
    ({"tool_choice": "any"}, 422, "tool_choice"),
    ({"tool_choice": 1}, 400, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, 422, "tool_choice.type"),
    ({"tool_choice": {"type": "function", "name": "other"}}, 422, "tool_choice.name"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "any", "tools": []}}, 422, "tool_choice.mode"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [PING]}}, 422, "tool_choice.tools.0.name"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}}, 422, "tool_choice.tools"),
    ({"text": {"format": {}}}, 400, "text.format.type"),
    ({"text": {"format": {"type": "grammar"}}}, 422, "text.format.type"),
    (form(), 400, "text.format.schema"),
    (form(name="a b", schema={}), 422, "text.format.name"),
    (form(name="a"), 400, "text.format.schema"),
    (form(name="a", schema=1), 400, "text.format.schema"),
    (form(name="a", schema={}, strict=1), 400, "text.format.strict"),
    ({"text": {"verbosity": "low"}}, 422, "text.verbosity"),
    ({"guided_regex": "a", "text": {"format": {"type": "json_object"}}}, 422, "guided_regex"),
    ({"reasoning": {"summary": "detailed"}}, 422, "reasoning.summary"),
    ({"reasoning": {"effort": 1}}, 400, "reasoning.effort"),
    ({"reasoning": {"effort": ""}}, 422, "reasoning.effort"),
    ({"include": ["everything"]}, 422, "include.0"),
    ({"include": [1]}, 400, "include.0"),
    ({"max_output_tokens": -5}, 422, "max_output_tokens"),
    ({"store": True}, 422, "store"),
    ({"background": True}, 422, "background"),
    ({"previous_response_id": "resp_1"}, 422, "previous_response_id"),
    ({"conversation": "conv_1"}, 422, "conversation"),
    ({"prompt": {"id": "a"}}, 422, "prompt"),
    ({"truncation": "auto"}, 422, "truncation"),
    ({"n": 2}, 422, "n"),
    ({"messages": []}, 422, "messages"),
    ({"max_tokens": 5}, 422, "max_tokens"),
    ({"response_format": {"type": "text"}}, 422, "response_format"),
    ({"stream_options": {}}, 422, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, 422, "stream_options.include_obfuscation"),
    ({"temperature": 9}, 422, "temperature"),
    ({"model": "other"}, 404, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_refused_is_named(fields: dict[str, Any], status: int, param: str) -> None:
    answer = ask(**fields)
    assert (answer.status, answer.error["param"]) == (status, param), answer.body
    assert param.split(".")[-1] in answer.error["message"] or param == "model"
    assert "messages" not in answer.error["message"] or param == "messages"


def test_what_a_response_repeats_is_bounded() -> None:
    """It is kept until the reply ends, however slowly that is read, and no prompt need hold it."""
    tool = {"type": "function", "name": "a", "description": "x" * (1 << 20)}
    for fields, param in (({"metadata": {"a": "x" * (1 << 20)}}, "metadata"), ({"tools": [tool]}, "tools")):
        answer = ask(**fields, tool_choice="none")
        assert (answer.status, answer.error["param"]) == (422, param)
        assert "at most 1048576" in answer.error["message"]


def test_what_could_be_done_instead_is_said() -> None:
    assert "send the items" in ask(previous_response_id="resp_1").error["message"]
    assert "max_output_tokens" in ask(max_tokens=1).error["message"]


ERRORS = [
    # what the engine says, the body, what is told
    ("tools.1.function.parameters", [PING, NET], None, "tools.1.tools.0.parameters"),
    ("tools.2.function.parameters", [PING, NET],
     {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "namespace": "net", "name": "trace"}]},
     "tools.1.tools.1.parameters"),
    ("tools.0.function", [PING], None, "tools.0"),
    ("messages", [], None, "input"),
    ("reasoning_effort", [], None, "reasoning.effort"),
    ("max_tokens", [], None, "max_output_tokens"),
    ("text.format.schema", [], None, "text.format.schema"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tools", "choice", "own"), ERRORS, ids=lambda value: str(value)[:40])
def test_an_error_of_the_engine_speaks_of_the_bodys_fields(name: str, tools: Any, choice: Any, own: str) -> None:
    engine = FakeEngine(prepare_error=InvalidParameter(f"{name} is wrong.", param=name))
    answer = ask(engine, tools=tools, tool_choice=choice)
    assert (answer.status, answer.error["param"], answer.error["message"]) == (422, own, f"{own} is wrong.")


def test_an_error_speaks_of_other_fields_as_the_body_does() -> None:
    """A message names a field of another endpoint, and the client looks for it in vain."""
    for said, told in (
        ("min_tokens is 50, more than max_tokens, 3.", "min_tokens is 50, more than max_output_tokens, 3."),
        ("min_tokens: turn it off (reasoning_effort: none).", "min_tokens: turn it off (reasoning.effort: none)."),
        *((same, same) for same in ("min_tokens: not 'my max_tokens'.", "min_tokens: at /properties/max_tokens/type.",
                                    "min_tokens: max_tokens_of, xmax_tokens, max_tokens.0.", "min_tokens: messages.")),
    ):  # fmt: skip
        assert ask(FakeEngine(prepare_error=InvalidParameter(said, param="min_tokens"))).error["message"] == told


def test_an_error_keeps_its_numbers() -> None:
    error = ContextLengthExceeded("too long", param="messages", prompt_tokens=9, context_length=4)
    answer = ask(FakeEngine(prepare_error=error))
    assert (answer.status, answer.error["param"], answer.error["prompt_tokens"]) == (400, "input", 9)


# -- requests that clients have sent ----------------------------------------------------------------------------------

LACKS = {"web_search": "tools.2.type", "item_reference": "input.1.type"}


@pytest.mark.parametrize(
    ("client", "number"), [(name, i) for name, found in RECORDED.items() for i in range(len(found))]
)
def test_recorded_requests(client: str, number: int) -> None:
    """Codex CLI, the OpenAI Agents SDK and the Vercel AI SDK: served, or the one thing that is not is named."""
    sent = {**RECORDED[client][number], "model": "fake"}
    engine = FakeEngine(word_by_word("A", "B"))
    answer = call(make_app(engine), sent, path=PATH)
    lacks = next((param for word, param in LACKS.items() if f'"type": "{word}"' in json.dumps(sent)), None)
    if lacks is not None:
        assert (answer.status, answer.error["param"]) == (422, lacks)
        assert "send the items" in answer.error["message"] or "switch it off in the client" in answer.error["message"]
        place, index, _ = lacks.split(".")
        sent[place] = [one for i, one in enumerate(sent[place]) if i != int(index)]
        answer = call(make_app(engine), sent, path=PATH)
    assert answer.status == 200, answer.body
    ignored = answer.headers.get("x-ignored-fields")
    assert ignored == ("tools.1.description" if client == "codex" else None)
    if sent.get("stream"):
        assert collected(read(answer.body))["output"][0]["content"][0]["text"] == "AB"
    else:
        assert Response.model_validate(answer.json).output_text == "AB"


def test_the_description_has_the_honoured_fields_and_its_example_succeeds() -> None:
    app = make_app()
    described = app.openapi()["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]
    assert set(described["schema"]["properties"]) == set(RESPONSES.honoured)
    assert set(SAMPLING) - set(RESPONSES.honoured) == {"n", "logprobs"}
    example = {**openapi.EXAMPLES["response"], "model": "fake"}
    assert call(app, example, path=PATH).status == 200

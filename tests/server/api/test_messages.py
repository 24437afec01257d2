"""`POST /messages`: every field is handed to the engine, named as ignored, or refused by its path."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from asgi import call
from fakes import INFO, FakeEngine, make_app
from message_shapes import COUNT, MESSAGES, ask, body_of, count_of, error_of, message_of

from engine import (
    ChatMessage,
    Constraint,
    GenerationRequest,
    InvalidParameter,
    ModelInfo,
    PreparedRequest,
    Tool,
    ToolCall,
    ToolChoice,
)
from server.api.messages.fields import COUNT as COUNT_FIELDS, MESSAGE

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
PING: dict[str, Any] = {"name": "ping", "input_schema": {"type": "object"}}
USE: dict[str, Any] = {"type": "tool_use", "id": "toolu_1", "name": "ping", "input": {"a": "é"}}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT: dict[str, Any] = {"type": "json_schema", "schema": SCHEMA}
CALLED: dict[str, Any] = {"role": "assistant", "content": [USE]}


def text(text: str, **others: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **others}


def result(**fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", **fields}


THINKING: ModelInfo = dataclasses.replace(INFO, reasoning=("<think>", "</think>"))


def prepared(path: str = MESSAGES, **fields: Any) -> GenerationRequest:
    """What the engine is told, of a request in which nothing is ignored."""
    engine = FakeEngine(info=THINKING)
    answer = ask(make_app(engine), path, **fields)
    assert answer.status == 200, answer.body
    assert "x-ignored-fields" not in answer.headers
    return engine.requests[-1]


def user(*texts: str) -> ChatMessage:
    return ChatMessage("user", "\n".join(texts))


def tool(content: str) -> ChatMessage:
    return ChatMessage("tool", content, tool_call_id="toolu_1")


CALL = ChatMessage("assistant", "", tool_calls=(ToolCall("toolu_1", "ping", '{"a": "é"}'),))

CONVERSATIONS: dict[str, tuple[dict[str, Any], list[ChatMessage]]] = {
    "text": ({}, [user("Hi")]),
    "blocks": ({"messages": [{**USER, "content": [text("a"), text("b")]}]}, [user("a", "b")]),
    "no blocks": ({"messages": [{**USER, "content": []}]}, [user("")]),
    "marks of caching and empty citations": (
        {"messages": [{**USER, "content": [text("a", cache_control={"type": "ephemeral"}, citations=[])]}]},
        [user("a")],
    ),
    "system": ({"system": "Be brief."}, [ChatMessage("system", "Be brief."), user("Hi")]),
    "system in blocks": ({"system": [text("a"), text("b")]}, [ChatMessage("system", "a\nb"), user("Hi")]),
    "no system": ({"system": ""}, [user("Hi")]),
    "a system message first": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, USER]},
        [ChatMessage("system", "a\nb"), user("Hi")],
    ),
    "a system message later": (
        {"messages": [USER, {"role": "system", "content": [text("now")]}]},
        [user("Hi"), ChatMessage("system", "now")],
    ),
    "turns of one role": (
        {
            "messages": [
                USER,
                USER,
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}]},
                {"role": "assistant", "content": [text("a"), text("b")]},
                {"role": "assistant", "content": None},
                USER,
            ]
        },
        [user("Hi", "Hi"), ChatMessage("assistant", "ab", reasoning_content="hm"), user("Hi")],
    ),
    "a call and its result": (
        {"messages": [USER, CALLED, {"role": "user", "content": [result(content="pong")]}]},
        [user("Hi"), CALL, tool("pong")],
    ),
    "a call with words": (
        {"messages": [USER, {"role": "assistant", "content": [text("Now."), USE]}, USER]},
        [user("Hi"), ChatMessage("assistant", "Now.", tool_calls=CALL.tool_calls), user("Hi")],
    ),
    "results come first": (
        {
            "messages": [
                USER,
                CALLED,
                {"role": "user", "content": [text("and"), result(content=[text("a"), text("b")]), text("now")]},
            ]
        },
        [user("Hi"), CALL, tool("a\nb"), user("and", "now")],
    ),
    "an empty result": (
        {"messages": [USER, CALLED, {"role": "user", "content": [result(), result(content=None)]}]},
        [user("Hi"), CALL, tool(""), tool("")],
    ),
    "a result that is an error": (
        {
            "messages": [
                USER,
                CALLED,
                {"role": "user", "content": [result(content="no", is_error=True), result(is_error=True)]},
            ]
        },
        [user("Hi"), CALL, tool("Error: no"), tool("Error")],
    ),
}


@pytest.mark.parametrize("path", [MESSAGES, "/api" + MESSAGES, COUNT])
@pytest.mark.parametrize(("fields", "messages"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(path: str, fields: dict[str, Any], messages: list[ChatMessage]) -> None:
    engine = FakeEngine()
    answer = ask(make_app(engine), path, **fields)
    assert answer.status == 200, answer.body
    assert "x-ignored-fields" not in answer.headers
    assert list(engine.requests[-1].messages or ()) == messages


SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"sampling": {"max_tokens": 30}, "reasoning_effort": None, "tools": (), "constraint": None}),
    ({"max_tokens": None}, {"sampling": {}}),
    (
        {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4, "stop_sequences": ["a", "b", "a"], "min_p": 0.1},
        {
            "sampling": {
                "max_tokens": 30, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4, "stop": ("a", "b"),
                "min_p": 0.1,
            }
        },
    ),
    ({"stop_sequences": []}, {"sampling": {"max_tokens": 30, "stop": ()}}),
    ({"tools": [PING]}, {"tools": (Tool("ping", None, {"type": "object"}),), "tool_choice": ToolChoice()}),
    (
        {
            "tools": [
                {
                    **PING, "type": "custom", "description": "x", "strict": True, "eager_input_streaming": True,
                    "cache_control": {"type": "ephemeral"}, "defer_loading": False, "allowed_callers": ["direct"],
                }
            ],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
        {"tools": (Tool("ping", "x", {"type": "object"}, True),), "parallel_tool_calls": False},
    ),
    ({"tools": [PING], "tool_choice": {"type": "any"}}, {"tool_choice": ToolChoice("required")}),
    (
        {"tools": [PING], "tool_choice": {"type": "tool", "name": "ping"}},
        {"tool_choice": ToolChoice("function", "ping")},
    ),
    ({"tools": [PING], "tool_choice": {"type": "none"}}, {"tools": (), "tool_choice": ToolChoice()}),
    ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
    ({"thinking": {"type": "adaptive", "display": "summarized"}}, {"reasoning_effort": "medium"}),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"reasoning_effort": "medium", "sampling": {"max_tokens": 30, "thinking_budget": 1024}},
    ),
    ({"thinking": {"type": "enabled"}}, {"reasoning_effort": "medium", "sampling": {"max_tokens": 30}}),
    (
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max", "format": None}},
        {"reasoning_effort": "xhigh"},
    ),
    ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
    (
        {"output_config": {"format": FORMAT}},
        {"constraint": Constraint("json", SCHEMA, True, "output_config.format.schema")},
    ),
    ({"output_format": FORMAT}, {"constraint": Constraint("json", SCHEMA, True, "output_format.schema")}),
    ({"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": {"a": 1}}),
    ({"cache_salt": "x"}, {"cache_salt": "x"}),
    # What asks for what happens anyway, or for nothing.
    (
        {
            "metadata": {"user_id": None}, "service_tier": "auto", "cache_control": {"type": "ephemeral", "ttl": "1h"},
            "container": None, "mcp_servers": [], "context_management": {"edits": []}, "inference_geo": "global",
            "speed": "standard", "n": 1,
        },
        {"sampling": {"max_tokens": 30}},
    ),
    (
        {
            "metadata": {"user_id": "u"}, "service_tier": "standard_only",
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        },
        {},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "told"), SETTINGS, ids=lambda value: json.dumps(value, default=str)[:60])
def test_settings(fields: dict[str, Any], told: dict[str, Any]) -> None:
    request = prepared(**fields)
    assert {name: getattr(request, name) for name in told} == told


NAMED: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "colour"),
    ({"betas": ["x"]}, "betas"),
    ({"messages": [{**USER, "name": "x"}]}, "messages.0.name"),
    ({"messages": [{**USER, "content": [text("a", color="red")]}]}, "messages.0.content.0.color"),
    ({"messages": [{**USER, "content": [text("a", citations=[{}])]}]}, "messages.0.content.0.citations"),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, USER]},
        "messages.1.content.0",
    ),
    ({"tools": [{**PING, "input_examples": [{}]}]}, "tools.0.input_examples"),
    ({"tools": [PING], "tool_choice": {"type": "auto", "name": "ping"}}, "tool_choice.name"),
    ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, "output_config.effort"),
    ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
    ({"output_config": {"format": {**FORMAT, "name": "x"}}}, "output_config.format.name"),
    ({"context_management": {"mode": 1}}, "context_management.mode"),
]


@pytest.mark.parametrize(("fields", "name"), NAMED, ids=[name for _, name in NAMED])
def test_what_has_no_effect_is_named(fields: dict[str, Any], name: str) -> None:
    engine = FakeEngine(info=THINKING)
    assert ask(make_app(engine), **fields).headers["x-ignored-fields"] == name
    refused = ask(make_app(FakeEngine(info=THINKING), strict_params=True), **fields)
    assert (refused.status, error_of(refused)["param"]) == (422, name)


def at(content: Any, role: str = "user") -> dict[str, Any]:
    """A conversation whose second message has this content."""
    return {"messages": [USER, {"role": role, "content": content}, USER]}


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": None}, 400, "model"),
    ({"model": "other"}, 404, "model"),
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 422, "messages"),
    ({"messages": [5]}, 400, "messages.0"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 422, "messages.0.role"),
    ({"messages": [USER, {"role": "assistant", "content": "The best "}]}, 422, "messages.1.content"),
    ({"messages": [USER, {"role": "assistant", "content": [text("The best\n")]}]}, 422, "messages.1.content"),
    ({"system": "Be brief.", "messages": [USER, CALLED]}, 422, "messages.1.content"),
    (at(["x"]), 400, "messages.1.content.0"),
    (at([{"text": "x"}]), 400, "messages.1.content.0.type"),
    (at([{"type": "text"}]), 400, "messages.1.content.0.text"),
    (at([text("x", cache_control=1)]), 400, "messages.1.content.0.cache_control"),
    *(
        (at([text("a"), {"type": kind}]), 422, "messages.1.content.1.type")
        for kind in ("image", "document", "search_result", "server_tool_use", "web_search_tool_result", "x" * 500)
    ),
    (at([USE]), 422, "messages.1.content.0.type"),
    (at([result()], "assistant"), 422, "messages.1.content.0.type"),
    (at([{"type": "thinking", "thinking": "x"}], "system"), 422, "messages.1.content.0.type"),
    (at([result()]), 422, "messages.1.content.0.tool_use_id"),
    (at([result(tool_use_id="")]), 422, "messages.1.content.0.tool_use_id"),
    (at([{**USE, "input": "{}"}], "assistant"), 400, "messages.1.content.0.input"),
    (at([{**USE, "name": "a b"}], "assistant"), 422, "messages.1.content.0.name"),
    (at([{**USE, "id": "x" * 257}], "assistant"), 422, "messages.1.content.0.id"),
    (
        {"messages": [USER, CALLED, {"role": "user", "content": [result(content=[{"type": "image"}])]}]},
        422,
        "messages.2.content.0.content.0.type",
    ),
    (
        {"messages": [USER, CALLED, {"role": "user", "content": [result(is_error="yes")]}]},
        400,
        "messages.2.content.0.is_error",
    ),
    ({"system": 5}, 400, "system"),
    ({"system": [{"type": "image"}]}, 422, "system.0.type"),
    ({"max_tokens": -5}, 422, "max_tokens"),
    ({"max_tokens": "x"}, 400, "max_tokens"),
    ({"temperature": 3}, 422, "temperature"),
    ({"stop_sequences": "x"}, 400, "stop_sequences"),
    ({"stop_sequences": [""]}, 422, "stop_sequences"),
    ({"stop_sequences": ["x"] * 17}, 422, "stop_sequences"),
    ({"stop": ["x"]}, 422, "stop"),
    ({"tools": [5]}, 400, "tools.0"),
    ({"tools": [{"name": "x"}]}, 400, "tools.0.input_schema"),
    ({"tools": [{**PING, "name": "a b"}]}, 422, "tools.0.name"),
    ({"tools": [PING, PING]}, 422, "tools.1.name"),
    ({"tools": [{**PING, "defer_loading": True}]}, 422, "tools.0.defer_loading"),
    *(
        ({"tools": [{"type": kind, "name": "x"}]}, 422, "tools.0.type")
        for kind in ("bash_20250124", "text_editor_20250728", "web_search_20250305", "computer_20250124")
    ),
    ({"tool_choice": "auto"}, 400, "tool_choice"),
    ({"tool_choice": {}}, 400, "tool_choice.type"),
    ({"tool_choice": {"type": "any"}}, 422, "tool_choice"),
    ({"tool_choice": {"type": "x"}}, 422, "tool_choice.type"),
    ({"tools": [PING], "tool_choice": {"type": "tool"}}, 400, "tool_choice.name"),
    ({"tools": [PING], "tool_choice": {"type": "tool", "name": "pong"}}, 422, "tool_choice.name"),
    ({"thinking": True}, 400, "thinking"),
    ({"thinking": {"type": "between_tools"}}, 422, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": -1}}, 422, "thinking.budget_tokens"),
    ({"thinking": {"type": "adaptive", "display": "omitted"}}, 422, "thinking.display"),
    ({"output_config": {"effort": "none"}}, 422, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_object"}}}, 422, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, 400, "output_config.format.schema"),
    ({"output_config": {"format": FORMAT}, "output_format": FORMAT}, 422, "output_format"),
    (
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        422,
        "context_management.edits.0.type",
    ),
    ({"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, 422, "context_management.edits.0.keep"),
    *(
        ({name: value}, 422, name)
        for name, value in {
            "mcp_servers": [{}], "container": "x", "service_tier": "priority", "inference_geo": "us", "n": 2,
            "speed": "fast", "diagnostics": {}, "logprobs": True, "response_format": {"type": "json_object"},
        }.items()
    ),
    ({"receipt": "all"}, 422, "receipt"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "status", "param"), REFUSED, ids=[f"{p}-{i}" for i, (_, _, p) in enumerate(REFUSED)]
)
def test_what_cannot_be_honoured_is_refused_by_its_path(fields: dict[str, Any], status: int, param: str) -> None:
    """Before the first byte, also of a stream."""
    body = {name: value for name, value in body_of(**fields).items() if value is not None}
    for stream in (False, True):
        answer = call(make_app(), {**body, "stream": stream}, path=MESSAGES)
        assert answer.status == status, answer.body
        error = error_of(answer)
        assert error["param"] == param
        assert param[:100] in error["message"] or status == 404


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"thinking": {"type": "disabled"}}, "thinking"),
        ({"thinking": {"type": "enabled"}, "output_config": {"effort": "low"}}, "thinking"),
        ({}, "thinking"),
    ],
)
@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_an_effort_is_named_as_it_was_sent(fields: dict[str, Any], own: str, path: str) -> None:
    class Refusing(FakeEngine):
        async def prepare(self, request: GenerationRequest) -> Any:
            raise InvalidParameter("reasoning_effort: no.", param="reasoning_effort")

        tokenize = prepare

    class Ignoring(FakeEngine):
        async def prepare(self, request: GenerationRequest) -> PreparedRequest:
            ignored = ("reasoning_effort",) if request.reasoning_effort else ()
            return dataclasses.replace(await super().prepare(request), ignored=ignored)

    error = error_of(ask(make_app(Refusing()), path, **fields))
    assert (error["param"], error["message"]) == (own, f"{own}: no.")
    if path == MESSAGES:
        assert ask(make_app(Ignoring()), **fields).headers.get("x-ignored-fields") == (own if fields else None)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("tools.0.function.parameters", "tools.0.input_schema"),
        ("tools.12.function.name", "tools.12.name"),
        ("stop", "stop_sequences"),
        ("thinking_budget", "thinking.budget_tokens"),
        ("reasoning_effort", "thinking"),
        ("messages", "messages"),
        (None, None),
    ],
)
@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_errors_of_the_engine_name_the_fields_of_the_body(name: str | None, own: str | None, path: str) -> None:
    class Refusing(FakeEngine):
        async def prepare(self, request: GenerationRequest) -> Any:
            raise InvalidParameter(f"{name}: no.", param=name)

        tokenize = prepare

    error = error_of(ask(make_app(Refusing()), path))
    assert (error["param"], error["message"]) == (own, f"{own}: no.")


def test_a_budget_for_a_model_that_does_not_think_is_named() -> None:
    """Clients ask all models alike; a limit on what there is not is kept anyway."""
    engine = FakeEngine()
    answer = ask(make_app(engine), thinking={"type": "enabled", "budget_tokens": 2000})
    assert answer.headers["x-ignored-fields"] == "thinking.budget_tokens"
    assert "thinking_budget" not in engine.requests[-1].sampling


def test_a_count_is_of_the_same_prompt() -> None:
    fields: dict[str, Any] = {"system": "Be brief.", "tools": [PING], "thinking": {"type": "adaptive"}}
    counted, asked = prepared(COUNT, **fields), prepared(**fields)
    for name in ("messages", "tools", "reasoning_effort", "chat_template_kwargs", "add_generation_prompt"):
        assert getattr(counted, name) == getattr(asked, name)


def test_a_count_of_a_conversation_that_nobody_goes_on_with() -> None:
    fields: dict[str, Any] = {"messages": [USER, CALLED]}
    assert not prepared(COUNT, **fields).add_generation_prompt
    assert not prepared(COUNT, **fields).continue_final_message
    assert count_of(ask(make_app(), COUNT, **fields)) == 5


def test_a_last_message_of_the_assistant_is_gone_on_with() -> None:
    begun: dict[str, Any] = {
        "messages": [USER, {"role": "assistant", "content": "Yes, "}, {"role": "assistant", "content": "but"}]
    }
    for path in (MESSAGES, COUNT):
        request = prepared(path, **begun)
        assert request.continue_final_message
        assert (request.messages or ())[-1].content == "Yes, \nbut"
    assert not prepared().continue_final_message


def test_fields_of_a_message_without_meaning_for_a_count_are_named() -> None:
    assert ask(make_app(), COUNT, max_tokens=5, stream=True).headers["x-ignored-fields"] == "max_tokens, stream"
    assert set(COUNT_FIELDS.honoured) < set(MESSAGE.honoured)


def test_what_clients_send_beside_a_body_is_accepted() -> None:
    headers = [(b"anthropic-version", b"2023-06-01"), (b"anthropic-beta", b"a,b"), (b"x-api-key", b"none")]
    for path in (MESSAGES, COUNT):
        answer = ask(make_app(), path, how={"headers": headers, "query": b"beta=true"})
        assert answer.status == 200
        assert answer.headers["request-id"] == answer.headers["x-request-id"]
        assert "x-ignored-fields" not in answer.headers


def test_a_reply_is_called_as_its_endpoint_calls_it() -> None:
    message = message_of(ask(make_app()))
    assert message["id"].startswith("msg_")
    assert (message["seed"], message["system_fingerprint"], message["model"]) == (77, "fp_fake", "fake")
    assert message["content"] == [{"type": "text", "text": "Hello wörld!"}]


def test_a_coding_agents_request() -> None:
    """The shape of what Claude Code sends: nothing in it is refused or without effect."""
    marked = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [text("<system-reminder>\n"), text("What is 2+2?", **marked)]},
        {"role": "system", "content": "Agents: none"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "sig"}, USE]},
        {"role": "user", "content": [result(content="hi", is_error=False, **marked)]},
    ]
    request = prepared(
        messages=messages,
        system=[text("header"), text("You are an agent.", **marked)],
        tools=[{**PING, "description": "x", "eager_input_streaming": True}],
        metadata={"user_id": '{"device_id":"x"}'},
        max_tokens=32000,
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        stream=True,
    )
    assert [message.role for message in request.messages or ()] == ["system", "user", "system", "assistant", "tool"]
    assert request.reasoning_effort == "high"

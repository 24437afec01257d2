"""The error table: every malformed request is told what is wrong with it, and the server goes on serving."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from asgi import CHAT, call
from fakes import CONTEXT, FakeEngine, chat, make_app

import engine
from engine import (
    EngineDead,
    InvalidFormat,
    ModelStatus,
    NumericalFault,
    OutOfMemory,
    QueueFull,
    TemplateRefused,
    VerbatimError,
)
from server.errors import TABLE, classify


def say(content: Any, role: Any = "user", **fields: Any) -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": content, **fields}])


def schema_format(inner: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": inner})


def raw(tail: str) -> bytes:
    """A good body with this text before its last brace."""
    return (json.dumps(chat())[:-1] + tail + "}").encode()


FORMAT, PARAMETER, UNSUPPORTED, MISSING = (
    "invalid_format",
    "invalid_parameter",
    "unsupported_parameter",
    "missing_field",
)
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def tool(function: Any) -> dict[str, Any]:
    return chat(tools=[{"type": "function", "function": function}])


CASES: list[tuple[str, bytes | dict[str, Any], int, str | None, str, str]] = [
    # name, body, status, param, code, words of the message
    ("empty", b"", 400, None, FORMAT, "not JSON"),
    ("not JSON", b"hello", 400, None, FORMAT, "not JSON"),
    ("cut", b'{"model": "fa', 400, None, FORMAT, "not JSON"),
    ("trailing", b"{} {}", 400, None, FORMAT, "not JSON"),
    ("not UTF-8", b'{"model": "\xff"}', 400, None, FORMAT, "byte 11 is 0xff"),
    ("UTF-16", json.dumps(chat()).encode("utf-16"), 400, None, FORMAT, "UTF-8"),
    ("byte order mark", b"\xef\xbb\xbf{}", 400, None, FORMAT, "not JSON"),
    ("list", b"[]", 400, None, FORMAT, "must be a JSON object, not a list"),
    ("null", b"null", 400, None, FORMAT, "must be a JSON object, not null"),
    ("string", b'"x"', 400, None, FORMAT, "must be a JSON object, not a string"),
    ("NaN", raw(', "temperature": NaN'), 400, None, FORMAT, "NaN is not a JSON number"),
    ("infinity", raw(', "temperature": Infinity'), 400, None, FORMAT, "Infinity is not a JSON number"),
    ("minus infinity", raw(', "top_p": -Infinity'), 400, None, FORMAT, "-Infinity is not a JSON number"),
    ("field twice", raw(', "seed": 1, "seed": 2'), 400, None, "duplicate_field", "'seed' twice"),
    ("deep list", raw(', "x": ' + "[" * 100_000 + "]" * 100_000), 400, None, FORMAT, "nested too deeply"),
    ("deep object", raw(', "x": ' + '{"a":' * 500 + "1" + "}" * 500), 400, None, FORMAT, "nested too deeply"),
    ("endless integer", raw(', "seed": ' + "9" * 5000), 400, None, FORMAT, "thousands of digits"),
    ("half a pair", raw(', "user": "\\ud800"'), 400, None, FORMAT, "surrogate"),
    ("half a pair as a key", raw(', "\\udfff": 1'), 400, None, FORMAT, "surrogate"),
    ("pair reversed", raw(', "user": "\\ude00\\ud83d"'), 400, None, FORMAT, "surrogate"),
    # model, messages
    ("no model", {"messages": chat()["messages"]}, 400, "model", MISSING, "model is required"),
    ("model null", chat(model=None), 400, "model", FORMAT, "must be a string, not null"),
    ("model number", chat(model=3), 400, "model", FORMAT, "must be a string, not a number, 3"),
    ("model unknown", chat(model="nope"), 404, "model", "model_not_found", "'nope'"),
    ("model empty", chat(model=""), 404, "model", "model_not_found", "''"),
    ("no messages", {"model": "fake"}, 400, "messages", MISSING, "messages is required"),
    ("messages null", chat(messages=None), 400, "messages", FORMAT, "not null"),
    ("messages text", chat(messages="hi"), 400, "messages", FORMAT, "must be a list, not a string"),
    ("messages empty", chat(messages=[]), 422, "messages", PARAMETER, "at least one message"),
    ("message text", chat(messages=["hi"]), 400, "messages.0", FORMAT, "must be an object"),
    ("no role", chat(messages=[{"content": "a"}]), 400, "messages.0.role", MISSING, "required"),
    ("role number", say("a", 1), 400, "messages.0.role", FORMAT, "must be a string"),
    ("role null", say("a", None), 400, "messages.0.role", FORMAT, "not null"),
    ("role unknown", say("a", "owner"), 422, "messages.0.role", PARAMETER, "'owner'"),
    ("no content", chat(messages=[{"role": "user"}]), 400, "messages.0.content", MISSING, "required"),
    ("content null", say(None), 400, "messages.0.content", FORMAT, "null only in an assistant's"),
    ("content number", say(5), 400, "messages.0.content", FORMAT, "a string or a list of parts, not a number, 5"),
    ("content object", say({"text": "a"}), 400, "messages.0.content", FORMAT, "not an object"),
    ("no parts", say([]), 422, "messages.0.content", PARAMETER, "at least one part"),
    ("part text", say(["a"]), 400, "messages.0.content.0", FORMAT, "must be an object"),
    ("part without type", say([{"text": "a"}]), 400, "messages.0.content.0.type", MISSING, "required"),
    ("part without text", say([{"type": "text"}]), 400, "messages.0.content.0.text", MISSING, "required"),
    ("part text null", say([{"type": "text", "text": None}]), 400, "messages.0.content.0.text", FORMAT, "not null"),
    (
        "part image",
        say([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
        422,
        "messages.0.content.1.type",
        UNSUPPORTED,
        "'image_url' is not supported; this server serves text only, no images",
    ),
    ("name number", say("a", name=3), 400, "messages.0.name", FORMAT, "must be a string"),
    ("name long", say("a", name="n" * 300), 422, "messages.0.name", PARAMETER, "256 characters, not 300"),
    (
        "second message",
        chat(messages=[{"role": "user", "content": "a"}, {"role": "x", "content": "a"}]),
        422,
        "messages.1.role",
        PARAMETER,
        "'x'",
    ),
    ("over the context", say("w " * CONTEXT), 400, "messages", "context_length_exceeded", f"has {CONTEXT} tokens"),
    # lengths and choices
    ("max_tokens -2", chat(max_tokens=-2), 422, "max_tokens", PARAMETER, "at least 0, not -2"),
    ("max_tokens 5.5", chat(max_tokens=5.5), 400, "max_tokens", FORMAT, "an integer"),
    ("max_tokens 2^60, written as a float", raw(', "max_tokens": 1e18'), 400, "max_tokens", FORMAT, "an integer"),
    ("max_tokens text", chat(max_tokens="5"), 400, "max_tokens", FORMAT, "an integer"),
    ("max_tokens true", chat(max_tokens=True), 400, "max_tokens", FORMAT, "an integer, not a boolean"),
    ("the loser", chat(max_completion_tokens=5, max_tokens=-2), 422, "max_tokens", PARAMETER, "at least 0, not -2"),
    ("min over max", chat(min_tokens=9, max_tokens=5), 422, "min_tokens", PARAMETER, "9, more than max_tokens, 5"),
    ("min_tokens -1", chat(min_tokens=-1), 422, "min_tokens", PARAMETER, "at least 0, not -1"),
    ("n 0", chat(n=0), 422, "n", PARAMETER, "at least 1, not 0"),
    ("n 17", chat(n=17), 422, "n", PARAMETER, "at most 16 here, not 17"),
    ("n 1.5", chat(n=1.5), 400, "n", FORMAT, "an integer"),
    # sampling
    ("temperature 2.1", chat(temperature=2.1), 422, "temperature", PARAMETER, "between 0 and 2, not 2.1"),
    ("temperature -1", chat(temperature=-1), 422, "temperature", PARAMETER, "not -1"),
    ("temperature 1e400", raw(', "temperature": 1e400'), 422, "temperature", PARAMETER, "not 1.797"),
    ("temperature 10^400", raw(', "temperature": 1' + "0" * 400), 422, "temperature", PARAMETER, "between 0 and 2"),
    ("temperature text", chat(temperature="hot"), 400, "temperature", FORMAT, 'a number, not a string, "hot"'),
    ("temperature false", chat(temperature=False), 400, "temperature", FORMAT, "not a boolean, false"),
    ("temperature list", chat(temperature=[1]), 400, "temperature", FORMAT, "not a list"),
    ("top_p 1.01", chat(top_p=1.01), 422, "top_p", PARAMETER, "between 0 and 1, not 1.01"),
    ("top_p object", chat(top_p={}), 400, "top_p", FORMAT, "not an object"),
    ("top_k -2", chat(top_k=-2), 422, "top_k", PARAMETER, "at least 0, not -2"),
    ("min_p 2", chat(min_p=2), 422, "min_p", PARAMETER, "between 0 and 1"),
    ("presence 3", chat(presence_penalty=3), 422, "presence_penalty", PARAMETER, "between -2 and 2, not 3"),
    ("frequency -3", chat(frequency_penalty=-3), 422, "frequency_penalty", PARAMETER, "between -2 and 2, not -3"),
    ("repetition 0", chat(repetition_penalty=0), 422, "repetition_penalty", PARAMETER, "not 0"),
    ("seed text", chat(seed="1"), 400, "seed", FORMAT, "an integer"),
    ("seed 1.5", chat(seed=1.5), 400, "seed", FORMAT, "an integer"),
    ("seed 2^63", chat(seed=2**63), 422, "seed", PARAMETER, str(2**63 - 1)),
    ("bias list", chat(logit_bias=[1]), 400, "logit_bias", FORMAT, "an object, not a list"),
    ("bias word", chat(logit_bias={"a": 1}), 422, "logit_bias.a", PARAMETER, "'a' is not a token id"),
    ("bias -1", chat(logit_bias={"-1": 1}), 422, "logit_bias.-1", PARAMETER, "not a token id"),
    ("bias arabic digit", chat(logit_bias={"٣": 1}), 422, "logit_bias.٣", PARAMETER, "not a token id"),
    ("bias 101", chat(logit_bias={"3": 101}), 422, "logit_bias.3", PARAMETER, "between -100 and 100, not 101"),
    ("bias text", chat(logit_bias={"3": "x"}), 400, "logit_bias.3", FORMAT, "must be a number"),
    ("bias null", chat(logit_bias={"3": None}), 400, "logit_bias.3", FORMAT, "must be a number"),
    ("bias outside", chat(logit_bias={"1000": 1}), 422, "logit_bias.1000", PARAMETER, "1000"),
    # stop
    ("stop empty", chat(stop=""), 422, "stop", PARAMETER, "empty string"),
    ("stop with empty", chat(stop=["a", ""]), 422, "stop", PARAMETER, "empty string"),
    ("stop many", chat(stop=[str(i) for i in range(17)]), 422, "stop", PARAMETER, "at most 16 strings, not 17"),
    ("stop number", chat(stop=1), 400, "stop", FORMAT, "a string or a list of strings"),
    ("stop numbers", chat(stop=[1]), 400, "stop", FORMAT, "a string or a list of strings"),
    ("stop long", chat(stop="x" * 2000), 422, "stop", PARAMETER, "1024 characters, not 2000"),
    ("stop ids text", chat(stop_token_ids="12"), 400, "stop_token_ids", FORMAT, "a list of integers"),
    ("stop ids null", chat(stop_token_ids=[None]), 400, "stop_token_ids", FORMAT, "a list of integers"),
    ("ignore_eos 1", chat(ignore_eos=1), 400, "ignore_eos", FORMAT, "true or false, not a number, 1"),
    # logprobs
    ("logprobs 3", chat(logprobs=3), 400, "logprobs", FORMAT, "true or false"),
    ("top_logprobs alone", chat(top_logprobs=3), 422, "top_logprobs", PARAMETER, "needs logprobs: true"),
    ("top_logprobs 21", chat(logprobs=True, top_logprobs=21), 422, "top_logprobs", PARAMETER, "0 and 20, not 21"),
    ("top_logprobs text", chat(top_logprobs="5"), 400, "top_logprobs", FORMAT, "an integer"),
    ("mode other", chat(logprobs_mode="x"), 422, "logprobs_mode", PARAMETER, "'x'"),
    ("mode number", chat(logprobs_mode=1), 400, "logprobs_mode", FORMAT, "a string"),
    ("token ids text", chat(return_token_ids="yes"), 400, "return_token_ids", FORMAT, "true or false"),
    # streaming
    ("stream text", chat(stream="true"), 400, "stream", FORMAT, 'not a string, "true"'),
    ("options without stream", chat(stream_options={}), 422, "stream_options", PARAMETER, "stream: true"),
    ("options list", chat(stream=True, stream_options=[]), 400, "stream_options", FORMAT, "an object"),
    (
        "usage text",
        chat(stream=True, stream_options={"include_usage": "yes"}),
        400,
        "stream_options.include_usage",
        FORMAT,
        "true or false",
    ),
    (
        "usage in every chunk",
        chat(stream=True, stream_options={"continuous_usage_stats": True}),
        422,
        "stream_options.continuous_usage_stats",
        UNSUPPORTED,
        "not supported",
    ),
    # the client's own
    ("template kwargs list", chat(chat_template_kwargs=[]), 400, "chat_template_kwargs", FORMAT, "an object"),
    ("metadata text", chat(metadata="x"), 400, "metadata", FORMAT, "an object"),
    # known elsewhere, not here
    *(
        (f"{name}", chat(**{name: value}), 422, name, UNSUPPORTED, f"{name} is not supported")
        for name, value in [
            ("functions", [{"name": "f"}]),
            ("function_call", "auto"),
            ("modalities", ["text", "audio"]),
            ("audio", {}),
            ("store", True),
            ("store", 0),
            ("web_search_options", {}),
            ("best_of", 2),
            ("best_of", True),
        ]
    ),
    ("effort, number", chat(reasoning_effort=7), 400, "reasoning_effort", FORMAT, "a string"),
    (
        "thoughts, number",
        say("x", "assistant", reasoning_content=7),
        400,
        "messages.0.reasoning_content",
        FORMAT,
        "a str",
    ),
    ("prediction, text", chat(prediction="x"), 400, "prediction", FORMAT, "an object"),
    ("prediction, no type", chat(prediction={"content": "x"}), 400, "prediction.type", MISSING, "required"),
    ("prediction, type", chat(prediction={"type": "x"}), 422, "prediction.type", PARAMETER, "content, not 'x'"),
    ("prediction, empty", chat(prediction={"type": "content"}), 400, "prediction.content", MISSING, "required"),
    (
        "prediction, image",
        chat(prediction={"type": "content", "content": [{"type": "image_url"}]}),
        422,
        "prediction.content.0.type",
        UNSUPPORTED,
        "text only",
    ),
    ("prompt_logprobs 21", chat(prompt_logprobs=21), 422, "prompt_logprobs", PARAMETER, "between 0 and 20, not 21"),
    ("prompt_logprobs true", chat(prompt_logprobs=True), 400, "prompt_logprobs", FORMAT, "an integer"),
    ("margins 1", chat(margins=1), 400, "margins", FORMAT, "true or false"),
    # tools
    ("tools, object", chat(tools={}), 400, "tools", FORMAT, "a list"),
    ("tools, text inside", chat(tools=["f"]), 400, "tools.0", FORMAT, "an object"),
    ("tools, no type", chat(tools=[{"function": {"name": "f"}}]), 400, "tools.0.type", MISSING, "required"),
    ("tools, other type", chat(tools=[{"type": "retrieval"}]), 422, "tools.0.type", UNSUPPORTED, "'retrieval'"),
    ("tools, no function", chat(tools=[{"type": "function"}]), 400, "tools.0.function", MISSING, "required"),
    ("tools, no name", tool({}), 400, "tools.0.function.name", MISSING, "required"),
    ("tools, bad name", tool({"name": "get weather"}), 422, "tools.0.function.name", PARAMETER, "'get weather'"),
    ("tools, empty name", tool({"name": ""}), 422, "tools.0.function.name", PARAMETER, "1 to 128"),
    ("tools, long name", tool({"name": "f" * 129}), 422, "tools.0.function.name", PARAMETER, "128"),
    (
        "tools, parameters text",
        tool({"name": "f", "parameters": "x"}),
        400,
        "tools.0.function.parameters",
        FORMAT,
        "an o",
    ),
    ("tools, strict text", tool({"name": "f", "strict": "yes"}), 400, "tools.0.function.strict", FORMAT, "true or f"),
    ("tools, twice", chat(tools=[TOOL, TOOL]), 422, "tools.1.function.name", PARAMETER, "'f' is there twice"),
    ("tools, many", chat(tools=[TOOL] * 129), 422, "tools", PARAMETER, "128"),
    ("choice, number", chat(tool_choice=1), 400, "tool_choice", FORMAT, "a string or an object"),
    ("choice, word", chat(tools=[TOOL], tool_choice="always"), 422, "tool_choice", PARAMETER, "'always'"),
    ("choice, required of none", chat(tool_choice="required"), 422, "tool_choice", PARAMETER, "at least one"),
    (
        "choice, unknown",
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        422,
        "tool_choice.function.name",
        PARAMETER,
        "'g' is not among",
    ),
    ("parallel, text", chat(parallel_tool_calls="no"), 400, "parallel_tool_calls", FORMAT, "true or false"),
    ("call of a user", say("x", tool_calls=[CALL]), 422, "messages.0.tool_calls", PARAMETER, "only an assistant"),
    (
        "call, no id",
        say("x", "assistant", tool_calls=[{"function": {}}]),
        400,
        "messages.0.tool_calls.0.id",
        MISSING,
        "required",
    ),
    (
        "call, list",
        say("x", "assistant", tool_calls=[{**CALL, "function": {"name": "f", "arguments": []}}]),
        400,
        "messages.0.tool_calls.0.function.arguments",
        FORMAT,
        "a string or an object, not a list",
    ),
    (
        "result of nothing",
        say("x", "tool", tool_call_id="call_9"),
        422,
        "messages.0.tool_call_id",
        PARAMETER,
        "'call_9'",
    ),
    ("result without id", say("x", "tool"), 400, "messages.0.tool_call_id", MISSING, "required"),
    ("result of a user", say("x", tool_call_id="a"), 422, "messages.0.tool_call_id", PARAMETER, "only a tool"),
    # what the reply must be
    ("format, text", chat(response_format="json"), 400, "response_format", FORMAT, "an object"),
    ("format, no type", chat(response_format={}), 400, "response_format.type", "missing_field", "required"),
    ("format, unknown", chat(response_format={"type": "xml"}), 422, "response_format.type", PARAMETER, "'xml'"),
    (
        "format, no schema object",
        chat(response_format={"type": "json_schema"}),
        400,
        "response_format.json_schema",
        "missing_field",
        "required",
    ),
    (
        "format, bad name",
        schema_format({"name": "a b", "schema": {}}),
        422,
        "response_format.json_schema.name",
        PARAMETER,
        "'a b'",
    ),
    (
        "format, long name",
        schema_format({"name": "a" * 129, "schema": {}}),
        422,
        "response_format.json_schema.name",
        PARAMETER,
        "128",
    ),
    (
        "format, no schema",
        schema_format({"name": "a"}),
        400,
        "response_format.json_schema.schema",
        "missing_field",
        "re",
    ),
    (
        "format, schema text",
        schema_format({"name": "a", "schema": "{}"}),
        400,
        "response_format.json_schema.schema",
        FORMAT,
        "an object",
    ),
    (
        "format, strict text",
        schema_format({"name": "a", "schema": {}, "strict": "yes"}),
        400,
        "response_format.json_schema.strict",
        FORMAT,
        "true or false",
    ),
    (
        "format and guide",
        chat(response_format={"type": "json_object"}, guided_regex="a"),
        422,
        "guided_regex",
        PARAMETER,
        "response_format and guided_regex",
    ),
    ("guide, no JSON", chat(guided_json="{"), 422, "guided_json", PARAMETER, "not JSON"),
    ("guide, JSON list", chat(guided_json="[]"), 400, "guided_json", FORMAT, "an object"),
    ("guide, empty regex", chat(guided_regex=""), 422, "guided_regex", PARAMETER, "empty"),
    ("guide, no choice", chat(guided_choice=[]), 422, "guided_choice", PARAMETER, "1 to 1024"),
    ("guide, empty choice", chat(guided_choice=["a", ""]), 422, "guided_choice", PARAMETER, "empty"),
    ("guide, number", chat(guided_choice=[1]), 400, "guided_choice.0", FORMAT, "a string"),
]


@pytest.fixture(scope="module")
def served() -> Any:
    """One application for the whole table: what a case breaks, the next one sees."""
    return make_app()


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_bad_requests_are_refused_by_name(
    served: Any, body: Any, status: int, param: str | None, code: str, words: str
) -> None:
    answer = call(served, body)
    error = answer.error
    assert (answer.status, error["param"], error["code"]) == (status, param, code), error["message"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert call(served, chat()).status == 200


@pytest.mark.parametrize("body", [c[1] for c in CASES if isinstance(c[1], dict) and "stream_options" not in c[1]][::5])
def test_a_stream_is_refused_like_a_body(served: Any, body: dict[str, Any]) -> None:
    """Everything that can be refused is refused before the first byte of a stream."""
    streamed, whole = call(served, {"stream": True, **body}), call(served, body)
    assert (streamed.status, streamed.error["code"]) == (whole.status, whole.error["code"])


def test_the_numbers_stand_beside_the_message(served: Any) -> None:
    error = call(served, say("w " * 100)).error
    assert (error["prompt_tokens"], error["context_length"]) == (100, CONTEXT)


def test_a_huge_value_does_not_come_back_in_the_message(served: Any) -> None:
    for body in (chat(model="m" * 10**6), chat(stop=["s" * 10**6]), chat(logprobs_mode="x" * 10**6)):
        answer = call(served, body)
        assert answer.status in (404, 422)
        assert len(answer.body) < 5000


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "headers"),
    [
        ([b"x" * 2000], [(b"content-length", b"2000")]),
        ([b"x" * 100] * 20, []),
        ([b"x" * 2000], [(b"content-length", b"5")]),
        ([b"x"], [(b"content-length", b"9" * 30)]),
    ],
    ids=["announced", "chunked", "lying", "absurd"],
)
def test_a_large_body_is_refused_while_it_is_read(parts: list[bytes], headers: list[tuple[bytes, bytes]]) -> None:
    answer = call(make_app(max_body_bytes=1024), parts, headers=headers)
    assert (answer.status, answer.error["code"], answer.error["limit"]) == (413, "body_too_large", 1024)
    assert "1024" in answer.error["message"]


def test_a_body_in_many_parts_is_one_body() -> None:
    data = json.dumps(chat()).encode()
    assert call(make_app(), [data[i : i + 7] for i in range(0, len(data), 7)]).status == 200


# -- other paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v2/chat/completions", 404, "not_found"),
        ("POST", CHAT + "/", 400, "invalid_format"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health/live", 405, "method_not_allowed"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_other_paths_answer_in_the_same_shape(served: Any, method: str, path: str, status: int, code: str) -> None:
    answer = call(served, b"", method=method, path=path)
    assert (answer.status, answer.error["code"]) == (status, code)


# -- the table -------------------------------------------------------------------------------------------------------

RAISED = [
    # what prepare or submit raises, status, type, code, may trying again help?
    (InvalidFormat("f", param="a.b"), 400, "invalid_request_error", "invalid_format", None),
    (TemplateRefused("roles must alternate"), 400, "invalid_request_error", "template_refused", None),
    (QueueFull("full", limit=3), 503, "server_overloaded", "queue_full", True),
    (EngineDead("dead: cause"), 503, "server_overloaded", "engine_dead", False),
    (OutOfMemory("no room"), 503, "server_overloaded", "out_of_memory", False),
    (NumericalFault("NaN"), 503, "server_overloaded", "numerical_fault", False),
    (VerbatimError("odd"), 500, "server_error", "error", None),
]


@pytest.mark.parametrize("where", ["prepare_error", "submit_error"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code", "again"), RAISED, ids=lambda v: getattr(v, "code", str(v)))
def test_engine_errors_follow_the_table(
    where: str, stream: bool, error: VerbatimError, status: int, kind: str, code: str, again: bool | None
) -> None:
    app = make_app(FakeEngine(**{where: error}), retry_after_seconds=9)  # type: ignore[arg-type]
    answer = call(app, chat(stream=stream))
    got = answer.error
    assert (answer.status, got["type"], got["code"], got["param"]) == (status, kind, code, error.param)
    assert got["message"] == error.message
    assert answer.headers.get("retry-after") == (None if again is None else "9")
    assert answer.headers.get("x-should-retry") == ("false" if again is False else None)


def test_every_error_class_has_a_row() -> None:
    for name in engine.errors.__all__:
        cls = getattr(engine, name)
        status, kind = classify(cls("x"))
        assert status >= 400
        assert kind
    assert TABLE[-1][0] is VerbatimError


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        (ModelStatus("m", "loading", "reading shard 2 of 5"), "model_loading", None),
        (ModelStatus("m", "failed", "config.json is missing"), "engine_dead", "false"),
    ],
)
def test_a_model_that_is_not_there_says_why(status: ModelStatus, code: str, again: str | None) -> None:
    answer = call(make_app(status), chat(model="m"))
    assert (answer.status, answer.error["code"]) == (503, code)
    assert status.detail in answer.error["message"]
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers.get("x-should-retry") == again


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["prepare_error", "submit_error"])
def test_a_bug_is_a_500_with_an_id_that_stands_in_the_log(
    where: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(FakeEngine(**{where: RuntimeError("inner words")}))  # type: ignore[arg-type]
    with caplog.at_level(logging.ERROR):
        answer = call(app, chat(stream=stream))
    assert answer.status == 500
    assert (answer.error["type"], answer.error["code"]) == ("server_error", "internal_error")
    assert "inner words" not in answer.body.decode()
    reference = answer.error["message"].split()[-1].rstrip(".")
    assert reference in caplog.text
    assert "inner words" in caplog.text
    assert answer.headers["x-request-id"]

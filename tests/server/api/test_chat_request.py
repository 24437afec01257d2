"""What a good body becomes: given fields only, nothing renamed, nothing dropped without a word."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import chat

from engine import SAMPLING_FIELDS, InvalidFormat, InvalidParameter, SamplingParams, VerbatimError
from server import json_text
from server.api import chat_request, openapi
from server.api.admission import shown_names
from server.api.fields import CHAT, ROLES, SAMPLING
from server.api.parsing import ParsedRequest

ROOT = Path(__file__).resolve().parents[3]


def parse(body: dict[str, Any] | str) -> ParsedRequest:
    return chat_request.parse((body if isinstance(body, str) else json.dumps(body)).encode(), "chatcmpl-1")


def test_a_field_that_was_not_given_leaves_the_models_default() -> None:
    """Null is what clients send for "not set": it must not reach the engine as a value."""
    nulls = dict.fromkeys([*SAMPLING, "max_tokens", "max_completion_tokens", "stream", "stream_options"])
    request = parse(chat(**nulls, **dict.fromkeys(CHAT.refused), user=None, metadata=None))
    assert request.generations[0].sampling == {}
    assert not request.stream
    assert not request.include_usage
    assert request.ignored == ()


GIVEN = [
    # body fields, what the engine is given
    ({"temperature": 0}, {"temperature": 0}),
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_completion_tokens": 6}, {"max_tokens": 6}),
    ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
    ({"max_tokens": 5, "max_completion_tokens": None}, {"max_tokens": 5}),
    ({"stop": "x"}, {"stop": "x"}),
    ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
    ({"logit_bias": {"5": -100}}, {"logit_bias": {"5": -100}}),
    ({"seed": -(2**63)}, {"seed": -(2**63)}),
    ({"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"top_k": 4, "min_p": 0.1}, {"top_k": 4, "min_p": 0.1}),
    ({"ignore_eos": False}, {"ignore_eos": False}),
    ({"user": "u", "metadata": {"a": "b"}}, {}),
]


@pytest.mark.parametrize(("fields", "given"), GIVEN, ids=lambda v: json.dumps(v)[:40])
def test_given_fields_reach_the_engine_unchanged(fields: dict[str, Any], given: dict[str, Any]) -> None:
    request = parse(chat(**fields))
    assert request.generations[0].sampling == given
    SamplingParams.merged(request.generations[0].sampling)


def test_every_sampling_field_of_the_engine_can_be_asked_for() -> None:
    """A control that the engine has and the endpoint does not know would be ignored with a header."""
    assert SAMPLING.keys() | {"max_tokens"} == SAMPLING_FIELDS.keys() <= CHAT.honoured.keys()


READERS = ("chat_request", "common_fields", "fields", "formats", "parsing", "tools")
NAMED = {"max_tokens"}
"""The one sampling field that a body may give under two names."""


@pytest.mark.parametrize("file", READERS)
def test_no_sampling_field_is_named_where_bodies_are_read(file: str) -> None:
    """A sampling parameter is declared in one place. A list of them elsewhere would have to be kept up with it."""
    tree = ast.parse((ROOT / "server" / "api" / f"{file}.py").read_text(encoding="utf-8"))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not (words & SAMPLING_FIELDS.keys()) - NAMED


MADE_UP = """
import dataclasses, json
from engine.types import sampling_params
from engine.types.sampling_fields import Number, sampling_field, sampling_fields

@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Params(sampling_params.SamplingParams):
    heat: float = sampling_field(0.5, Number(0.0, 2.0), "How hot.", extension=True)

sampling_params.SAMPLING_FIELDS = sampling_fields(Params)

from engine import VerbatimError
from server.api import chat_request, openapi

def outcome(**fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}
    try:
        parsed = chat_request.parse(json.dumps(body).encode(), "id")
        return parsed.ignored, Params.merged(parsed.generations[0].sampling).heat
    except VerbatimError as error:
        return error.param, error.message

print(json.dumps([
    outcome(), outcome(heat=2), outcome(heat=2.5), outcome(heat="hot"),
    openapi.CHAT_BODY["content"]["application/json"]["schema"]["properties"]["heat"],
]))
"""


def test_a_sampling_field_is_added_by_declaring_it() -> None:
    """One line in `SamplingParams`: the body's field, its type, its range and its description follow."""
    done = subprocess.run([sys.executable, "-c", MADE_UP], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    absent, given, too_much, wrong, described = json.loads(done.stdout)
    assert (absent, given) == ([[], 0.5], [[], 2.0])
    assert too_much == ["heat", "heat must be between 0 and 2, not 2.5."]
    assert wrong == ["heat", 'heat must be a number, not a string, "hot".']
    assert described == {
        "type": "number", "minimum": 0, "maximum": 2, "default": 0.5, "description": "Extension. How hot.",
    }  # fmt: skip


CONTENTS = [
    ("plain", "plain"),
    ("", ""),
    ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ([{"type": "text", "text": " a\n"}, {"type": "text", "text": " b"}], " a\n b"),
    ("\U0001f600 \u2028 é", "\U0001f600 \u2028 é"),
]


@pytest.mark.parametrize(("content", "text"), CONTENTS)
@pytest.mark.parametrize("role", ROLES)
def test_messages_keep_their_text(role: str, content: Any, text: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    before = [{"role": "assistant", "content": None, "tool_calls": [call]}] if role == "tool" else []
    answers = {"tool_call_id": "call_1"} if role == "tool" else {}
    request = parse(chat(messages=[*before, {"role": role, "content": content, "name": "N", **answers}]))
    assert request.generations[0].messages
    *_, message = request.generations[0].messages
    assert (message.role, message.content, message.name) == (role, text, "N")


def test_an_emoji_spelled_as_two_escapes_is_one_character() -> None:
    body = json.dumps(chat()).replace('"Hi"', '"\\ud83d\\ude00"')
    messages = parse(body).generations[0].messages
    assert messages
    assert messages[0].content == "\U0001f600"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    """SDKs dump the reply's message with all its empty fields; a conversation must go on from that."""
    reply = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "function_call": None}
    assert parse(chat(messages=[{"role": "user", "content": "a"}, {**reply, "audio": None}])).ignored == ()


NEUTRAL = [
    {"tools": []},
    {"tool_choice": "none"},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"store": False},
    {"functions": []},
    {"best_of": 1},
    {"stream": True, "stream_options": {"include_obfuscation": False, "continuous_usage_stats": False}},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda v: next(iter(v)))
def test_values_that_mean_the_default_are_taken(fields: dict[str, Any]) -> None:
    """Client libraries write them out; they ask for nothing that does not happen anyway."""
    assert parse(chat(**fields)).ignored == ()


IGNORED = [
    (chat(foo=1, bar=None), ("foo", "bar")),
    (chat(messages=[{"role": "user", "content": "a", "mood": 1}]), ("messages.0.mood",)),
    (
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]),
        ("messages.0.content.0.cache_control",),
    ),
    (chat(stream=True, stream_options={"x": 1}), ("stream_options.x",)),
    (chat(chat_template_kwargs={"anything": 1}, metadata={"k": "v"}), ()),
]


@pytest.mark.parametrize(("body", "names"), IGNORED, ids=lambda v: "-".join(v) if isinstance(v, tuple) else "")
def test_unknown_fields_are_named_wherever_they_stand(body: dict[str, Any], names: tuple[str, ...]) -> None:
    assert parse(body).ignored == names


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_usage_comes_only_when_asked_for(options: Any) -> None:
    assert not parse(chat(stream=True, stream_options=options)).include_usage
    assert parse(chat(stream=True, stream_options={"include_usage": True})).include_usage


def test_a_hundred_levels_pass_and_one_more_does_not() -> None:
    def nested(levels: int) -> str:
        return json.dumps(chat())[:-1] + ', "chat_template_kwargs": ' + '{"a":' * levels + "1" + "}" * levels + "}"

    assert parse(nested(json_text.MAX_DEPTH - 1))
    with pytest.raises(InvalidFormat, match="nested too deeply; 100 levels"):
        parse(nested(json_text.MAX_DEPTH))


def test_width_is_not_depth() -> None:
    assert parse(chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 50}] * 50))


# -- the document ----------------------------------------------------------------------------------------------------

DESCRIBED = openapi.CHAT_BODY["content"]["application/json"]["schema"]["properties"]


def test_the_document_lists_what_is_honoured_and_nothing_else() -> None:
    assert DESCRIBED.keys() == CHAT.honoured.keys()


BOUNDS = [
    (name, limit, field[limit], field["type"])
    for name, field in DESCRIBED.items()
    for limit in ("minimum", "maximum")
    if limit in field
]


@pytest.mark.parametrize(("name", "limit", "value", "kind"), BOUNDS, ids=lambda v: str(v))
def test_the_documents_limits_are_the_engines(name: str, limit: str, value: float, kind: str) -> None:
    """Ranges are checked in the engine and described in the document: two places that must not drift apart."""

    def check(number: float) -> None:
        fields = {name: int(number) if kind == "integer" else number}
        SamplingParams.merged(parse(chat(**fields, logprobs=True)).generations[0].sampling)

    check(value)
    step = 1 if kind == "integer" else 1e-6
    with pytest.raises(InvalidParameter) as caught:
        check(value + (step if limit == "maximum" else -step))
    assert caught.value.param == name


def test_the_documents_defaults_are_the_engines() -> None:
    for name, field in DESCRIBED.items():
        if name in SAMPLING_FIELDS and "default" in field:
            assert getattr(SamplingParams(), name) == field["default"], name


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (("a", "b.c"), "a, b.c"),
        (("a\r\nset-cookie: x",), "a??set-cookie:?x"),
        (("é\u2028\x00", "a,b"), "???, a?b"),
        (("x" * 1000,), "x" * 20 + "..." + "x" * 41),
    ],
)
def test_a_hostile_name_cannot_leave_its_header(names: tuple[str, ...], value: str) -> None:
    assert shown_names(names) == value


def test_the_header_is_bounded() -> None:
    value = shown_names(tuple("n" * 100 for _ in range(10_000)))
    assert len(value) < 2500
    assert value.endswith(", ...")


def test_a_duplicate_in_a_large_object_is_found_in_linear_time() -> None:
    """A quadratic search over 90,000 names would hold up every stream of the server for minutes."""
    names = ",".join(f'"k{i}":1' for i in range(90_000))
    with pytest.raises(VerbatimError, match="'k5' twice"):
        parse("{" + names + ',"k5":1}')

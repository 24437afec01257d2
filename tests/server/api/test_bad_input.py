"""Bad input against a real engine: the table of `test_errors`, every edge of every range, every wrong type.

A fake can agree with the server about a value that the real sampler then chokes on; here nothing is agreed.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from asgi import CHAT, Answer, begin
from test_errors import CASES

from engine import AsyncEngine, Registry
from server.api import openapi
from server.app import create_app
from server.settings import ServerSettings

pytestmark = pytest.mark.slow

CONTEXT = 128  # of the fixture's model
CHOICES = 4
TOKENS = 440  # of its tokenizer; the model has a few rows more
HELLO = [{"role": "user", "content": "Hi"}]
GOOD = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
"""One step, and yet a whole distribution whose bits can be compared."""


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 3, "seed": 7, **fields}


def ask(app: Any, body: bytes | dict[str, Any], **how: Any) -> Answer:
    return asyncio.run(begin_and_end(app, body, **how))


async def begin_and_end(app: Any, body: Any, **how: Any) -> Answer:
    return await begin(app, body, **how).ended(30)


@pytest.fixture(scope="module")
def served(registry: Registry) -> Any:
    """One application for all tables: what a case breaks, the next one sees."""
    return create_app(registry)


@pytest.fixture(scope="module")
def known(served: Any) -> Any:
    """What a good request is answered before anything bad has arrived."""
    return ask(served, chat(**GOOD)).json["choices"]


@pytest.fixture(autouse=True)
def unharmed(served: Any, known: Any, engine: AsyncEngine) -> Any:
    """After every case: nothing is left running, and a good request still gets the same answer, bit for bit."""
    yield
    answer = ask(served, chat(**GOOD))
    assert answer.status == 200
    assert answer.json["choices"] == known


# -- the table of test_errors, with the engine that it fakes ---------------------------------------------------------


def real(body: bytes | dict[str, Any]) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return data.replace(b'"model": "fake"', b'"model": "tiny"').replace(b'"model":"fake"', b'"model":"tiny"')


@pytest.mark.parametrize(("body", "status", "param", "code"), [c[1:5] for c in CASES], ids=[c[0] for c in CASES])
def test_the_real_engine_agrees_with_the_table(
    served: Any, body: Any, status: int, param: str | None, code: str
) -> None:
    if code == "context_length_exceeded":
        body = chat(messages=[{"role": "user", "content": "w " * CONTEXT}])
    answer = ask(served, real(body))
    assert (answer.status, answer.error["param"], answer.error["code"]) == (status, param, code), answer.error


# -- ranges ----------------------------------------------------------------------------------------------------------

NUMBERS = [
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 100.0),
]
INTEGERS = [
    # field, lowest, highest; None: as large as JSON can write
    ("n", 1, CHOICES),
    ("max_tokens", -1, None),
    ("max_completion_tokens", -1, None),
    ("top_k", -1, None),
    ("min_tokens", 0, 3),
    ("seed", -(2**63), 2**63 - 1),
    ("top_logprobs", 0, 20),
]

INSIDE = [
    *((name, value) for name, low, high in NUMBERS for value in (low, high, int(low) if low == int(low) else low)),
    *((name, math.nextafter(0.0, 1.0)) for name, low, _ in NUMBERS if low <= 0),
    ("temperature", 1e-300),
    ("temperature", 1e-6),
    *((name, value) for name, low, high in INTEGERS for value in (low, high or 2**63, high or 10**40)),
]
OUTSIDE = [
    *((name, value) for name, low, high in NUMBERS for value in (math.nextafter(low, -9), math.nextafter(high, 999))),
    *((name, value) for name, _, _ in NUMBERS for value in (1e308, -1e308, 10**400, -(10**400))),
    *((name, low - 1) for name, low, _ in INTEGERS),
    *((name, -(10**4000)) for name, _, _ in INTEGERS),
    *((name, high + 1) for name, _, high in INTEGERS if high),
    *((name, 10**4000) for name, _, high in INTEGERS if high),
]


def brief(value: Any) -> str:
    return str(value) if len(str(value)) < 30 else f"{str(value)[:6]}…{len(str(value))}"


@pytest.mark.parametrize(("name", "value"), INSIDE, ids=brief)
def test_the_edge_of_a_range_belongs_to_it(served: Any, name: str, value: float) -> None:
    answer = ask(served, {**chat(logprobs=True, ignore_eos=True), name: value})
    assert answer.status == 200, answer.body
    entries = [e for choice in answer.json["choices"] for e in choice["logprobs"]["content"]]
    assert len(entries) == answer.json["usage"]["completion_tokens"]
    assert all(e["logprob"] <= 0 for e in entries)


@pytest.mark.parametrize(("name", "value"), OUTSIDE, ids=brief)
def test_a_hair_outside_is_refused_with_field_and_limit(served: Any, name: str, value: float) -> None:
    answer = ask(served, {**chat(logprobs=True), name: value})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (422, name, "invalid_parameter")
    assert name in answer.error["message"]
    assert len(answer.body) < 3000


def test_zero_and_almost_zero_temperature_take_the_likeliest_token(served: Any) -> None:
    """A tiny temperature is not clamped upward, and dividing by it must not end in infinities."""
    texts = {
        json.dumps(ask(served, chat(temperature=t, max_tokens=12, ignore_eos=True)).json["choices"])
        for t in (0, 5e-324, 1e-300, 1e-9)
    }
    assert len(texts) == 1


def test_more_tokens_than_fit_are_cut_to_the_context(served: Any) -> None:
    answer = ask(served, chat(max_tokens=2**63, ignore_eos=True)).json
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CONTEXT


# -- types -----------------------------------------------------------------------------------------------------------

# What the served document says of each field: a source of its own, not the table that does the checking.
DESCRIBED: dict[str, Any] = openapi.CHAT_BODY["content"]["application/json"]["schema"]["properties"]
EXAMPLES: list[tuple[str, Any, set[str]]] = [
    # what the message calls it, a value, the types of the document that take it
    ("a boolean", True, {"boolean"}),
    ("a number", 1, {"integer", "number"}),
    ("a number", 1.5, {"number"}),
    ("a number", 1.0, {"integer", "number"}),
    ("a string", "1", {"string"}),
    ("a list", [1], {"array"}),
    ("an object", {"1": 1}, {"object"}),
]
WORDS = {"integer": "an integer", "number": "a number", "boolean": "true or false", "object": "an object"}


def described(name: str) -> set[str]:
    field = DESCRIBED[name]
    return {part["type"] for part in field.get("anyOf", [field])} - {"null"}


WRONG = [
    (name, called, value) for name in DESCRIBED for called, value, taken in EXAMPLES if not taken & described(name)
]


@pytest.mark.parametrize(("name", "called", "value"), WRONG)
def test_a_wrong_type_is_a_format_error_that_names_both_types(served: Any, name: str, called: str, value: Any) -> None:
    answer = ask(served, chat(**{name: value}))
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, name, "invalid_format")
    message = answer.error["message"]
    assert f", not {called}" in message
    if described(name) <= WORDS.keys():
        assert message.startswith(f"{name} must be {WORDS[described(name).pop()]}, not")


@pytest.mark.parametrize("name", sorted(DESCRIBED.keys() - {"model", "messages"}))
def test_null_is_not_set(served: Any, known: Any, name: str) -> None:
    answer = ask(served, {**chat(**GOOD), name: None})
    if name == "logprobs":
        assert (answer.status, answer.error["param"]) == (422, "top_logprobs"), "as if it had been left out"
        return
    assert answer.status == 200, answer.body
    if name not in ("max_tokens", "top_logprobs", "seed"):
        assert answer.json["choices"] == known


# -- what only the model can know ------------------------------------------------------------------------------------

BY_THE_MODEL: list[tuple[str, dict[str, Any], int, str, str, str]] = [
    # name, fields, status, param, code, words
    ("first id outside", {"logit_bias": {str(TOKENS): 1}}, 422, "logit_bias.440", "invalid_parameter", "0 to 439"),
    ("padding row", {"logit_bias": {"447": 1}}, 422, "logit_bias.447", "invalid_parameter", "447 is not a token"),
    ("id of 18 digits", {"logit_bias": {"9" * 18: 1}}, 422, f"logit_bias.{'9' * 18}", "invalid_parameter", "not a"),
    ("id of 19 digits", {"logit_bias": {"9" * 19: 1}}, 422, f"logit_bias.{'9' * 19}", "invalid_parameter", "not a"),
    ("id with space", {"logit_bias": {" 7": 1}}, 422, "logit_bias. 7", "invalid_parameter", "not a token id"),
    ("id with underscore", {"logit_bias": {"1_0": 1}}, 422, "logit_bias.1_0", "invalid_parameter", "not a token id"),
    ("id with plus", {"logit_bias": {"+1": 1}}, 422, "logit_bias.+1", "invalid_parameter", "not a token id"),
    ("id float", {"logit_bias": {"1.0": 1}}, 422, "logit_bias.1.0", "invalid_parameter", "not a token id"),
    ("id empty", {"logit_bias": {"": 1}}, 422, "logit_bias.", "invalid_parameter", "not a token id"),
    ("id superscript", {"logit_bias": {"²": 1}}, 422, "logit_bias.²", "invalid_parameter", "not a token id"),
    ("id arabic", {"logit_bias": {"٧": 1}}, 422, "logit_bias.٧", "invalid_parameter", "not a token id"),
    ("bias true", {"logit_bias": {"7": True}}, 400, "logit_bias.7", "invalid_format", "a number"),
    ("bias over", {"logit_bias": {"7": 100.00001}}, 422, "logit_bias.7", "invalid_parameter", "-100 and 100"),
    ("bias under", {"logit_bias": {"7": -101}}, 422, "logit_bias.7", "invalid_parameter", "-100 and 100"),
    ("bias huge", {"logit_bias": {"7": 10**400}}, 422, "logit_bias.7", "invalid_parameter", "-100 and 100"),
    ("stop id outside", {"stop_token_ids": [TOKENS]}, 422, "stop_token_ids", "invalid_parameter", "440"),
    ("stop id negative", {"stop_token_ids": [-1]}, 422, "stop_token_ids", "invalid_parameter", "-1"),
    ("stop id huge", {"stop_token_ids": [2**64]}, 422, "stop_token_ids", "invalid_parameter", "not a token"),
    ("stop id true", {"stop_token_ids": [True]}, 400, "stop_token_ids", "invalid_format", "integers"),
    ("stop ids many", {"stop_token_ids": [1] * 257}, 422, "stop_token_ids", "invalid_parameter", "256 ids, not 257"),
    ("template, unknown", {"chat_template_kwargs": {"mood": 1}}, 422, "chat_template_kwargs.mood",
     "invalid_parameter", "no variable 'mood'"),
    ("template, reserved", {"chat_template_kwargs": {"messages": []}}, 422, "chat_template_kwargs.messages",
     "invalid_parameter", "set by the server"),
    ("template, special", {"chat_template_kwargs": {"eos_token": "x"}}, 422, "chat_template_kwargs.eos_token",
     "invalid_parameter", "set by the server"),
    ("schema, unenforceable", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True,
     "schema": {"properties": {"a": {"type": "array", "uniqueItems": True}}}}}}, 422,
     "response_format.json_schema.schema", "schema_not_enforceable", "/properties/a/uniqueItems"),
    ("schema, unknown type", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True,
     "schema": {"type": "nothing"}}}}, 422, "response_format.json_schema.schema", "schema_not_enforceable", "/type"),
    ("schema, large", {"guided_json": {"enum": ["x" * 300_000]}}, 422, "guided_json", "invalid_parameter", "262144"),
    ("regex, unclosed", {"guided_regex": "(a"}, 422, "guided_regex", "invalid_parameter", "not valid"),
    ("grammar, nonsense", {"guided_grammar": "start: x"}, 422, "guided_grammar", "invalid_parameter", "not valid"),
    ("template, self", {"chat_template_kwargs": {"self": 1}}, 422, "chat_template_kwargs.self",
     "invalid_parameter", "no variable 'self'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "words"), [c[1:] for c in BY_THE_MODEL], ids=[c[0] for c in BY_THE_MODEL]
)
def test_what_only_the_model_can_refuse(
    served: Any, fields: dict[str, Any], status: int, param: str, code: str, words: str
) -> None:
    answer = ask(served, chat(**fields))
    assert (answer.status, answer.error["param"], answer.error["code"]) == (status, param, code), answer.error
    assert words in answer.error["message"]


def test_one_token_under_two_spellings_is_refused(served: Any) -> None:
    """One of the two biases would be ignored."""
    answer = ask(served, chat(logit_bias={"7": 1, "07": 2}))
    assert (answer.status, answer.error["param"]) == (422, "logit_bias.07")


ACCEPTED: dict[str, dict[str, Any]] = {
    "bias at the edges": {"logit_bias": {"0": 100, str(TOKENS - 1): -100}},
    "no bias": {"logit_bias": {}},
    "16 stops": {"stop": [f"never {i}" for i in range(16)]},
    "no stops": {"stop": []},
    "a stop of 1024": {"stop": "x" * 1024},
    "stop twice": {"stop": ["no", "no"]},
    "256 stop ids": {"stop_token_ids": [1] * 256},
    "no stop ids": {"stop_token_ids": []},
    "minus zero": {"temperature": -0.0, "seed": -0, "top_p": -0.0},
    "tool_choice none": {"tools": [], "tool_choice": "none"},
    "text": {"response_format": {"type": "text"}},
    "a JSON object": {"response_format": {"type": "json_object"}},
    "not strict": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": None,
                   "schema": {"enum": [1], "not": {"type": "null"}}}}},
    "a schema as text": {"guided_json": '{"enum": [1]}'},
    "one choice": {"guided_choice": ["a"]},
    "no variables": {"chat_template_kwargs": {}},
    "no text": {"messages": [{"role": "user", "content": ""}]},
    "control characters": {"messages": [{"role": "user", "content": "\x00\x1b[31m\u202e\ufeff"}]},
    "the template's own control words": {"messages": [{"role": "user", "content": "<|im_end|><|im_start|>system"}]},
    "assistant first": {"messages": [{"role": "assistant", "content": "a"}]},
    "developer": {"messages": [{"role": "developer", "content": "a"}, *HELLO]},
    "a long name": {"messages": [{"role": "user", "content": "a", "name": "n" * 256}]},
    "every rival": {"logprobs": True, "top_logprobs": 20, "logprobs_mode": "processed", "top_k": 1},
    "all at once": {
        "temperature": 1.5, "top_p": 0.5, "top_k": 20, "min_p": 0.01, "presence_penalty": -2, "frequency_penalty": 2,
        "repetition_penalty": 1.2, "logit_bias": {"7": 3}, "min_tokens": 2, "n": 4, "logprobs": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_looks_odd_but_is_right_is_answered(served: Any, name: str) -> None:
    answer = ask(served, chat(**ACCEPTED[name]))
    assert answer.status == 200, answer.body
    named = "response_format.json_schema.schema.not" if name == "not strict" else None  # it is checked afterwards
    assert answer.headers.get("x-ignored-fields") == named
    assert len(answer.json["choices"]) == ACCEPTED[name].get("n", 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
def test_with_every_token_banned_nothing_is_drawn(served: Any, temperature: int, stream: bool) -> None:
    """Found out only when a token is drawn, and still a status: nothing has been sent yet."""
    everything = {str(i): -100 for i in range(TOKENS)}
    answer = ask(served, chat(temperature=temperature, stream=stream, logit_bias=everything))
    assert (answer.status, answer.error["param"], answer.error["code"]) == (422, "logit_bias", "no_token_left")


def test_with_all_but_one_banned_that_one_is_drawn(served: Any) -> None:
    """A ban is a ban, not a large number."""
    only = {str(i): -100 for i in range(TOKENS) if i != 77}
    assert ask(served, chat(logit_bias=only, return_token_ids=True)).json["choices"][0]["token_ids"] == [77] * 3


def test_the_context_is_full_to_the_last_token(served: Any) -> None:
    """One token of room is enough; none is refused, with both numbers, and nothing is cut off in silence."""

    def tokens(letters: int, **fields: Any) -> Answer:
        return ask(served, chat(messages=[{"role": "user", "content": "7" * letters}], max_tokens=9, **fields))

    frame = tokens(1).json["usage"]["prompt_tokens"] - 1
    answer = tokens(CONTEXT - 1 - frame, ignore_eos=True)
    assert answer.status == 200
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (CONTEXT - 1, 1)
    assert answer.json["choices"][0]["finish_reason"] == "length"
    answer = tokens(CONTEXT - frame)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert (answer.error["prompt_tokens"], answer.error["context_length"]) == (CONTEXT, CONTEXT)
    assert tokens(100_000).error["prompt_tokens"] == 100_000 + frame


# -- unknown fields, prefixes, size ----------------------------------------------------------------------------------

HOSTILE = ["mood", "x\r\nset-cookie: a=b", "Ünïcode", "\x00", "a,b", "x" * 5000]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda v: ascii(v)[:20])
def test_an_unknown_field_is_named_in_a_header_that_cannot_be_broken(served: Any, known: Any, name: str) -> None:
    answer = ask(served, chat(**GOOD, **{name: 1}))
    assert answer.status == 200
    assert answer.json["choices"] == known
    shown = answer.headers["x-ignored-fields"]
    assert shown.isascii()
    assert shown.isprintable()
    assert "," not in shown
    assert len(shown) <= 64
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("name", HOSTILE, ids=lambda v: ascii(v)[:20])
def test_an_unknown_field_is_refused_when_parameters_are_strict(registry: Registry, name: str) -> None:
    answer = ask(create_app(registry, ServerSettings(strict_params=True)), chat(**{name: 1}))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (422, "unknown_field", name[:200])


def test_strict_parameters_take_every_known_field(registry: Registry) -> None:
    strict = create_app(registry, ServerSettings(strict_params=True))
    assert ask(strict, chat(user="u", metadata={"a": "b"}, tools=None, top_k=3)).status == 200


@pytest.mark.parametrize("case", [c for c in CASES if c[0] != "over the context"][::6], ids=lambda c: c[0])
def test_both_prefixes_say_the_same(served: Any, case: Any) -> None:
    first, second = (ask(served, real(case[1]), path=prefix + "/chat/completions") for prefix in ("/v1", "/api/v1"))
    assert (first.status, first.json) == (second.status, second.json)


def test_both_prefixes_answer_the_same(served: Any, known: Any) -> None:
    answer = ask(served, chat(**GOOD), path="/api/v1/chat/completions")
    assert answer.json["choices"] == known


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_only_post_is_taken(served: Any, method: str) -> None:
    answer = ask(served, b"", method=method)
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert CHAT in answer.error["message"]
    assert answer.headers["allow"] == "POST, OPTIONS"


def test_a_body_to_the_last_byte_of_the_limit(registry: Registry) -> None:
    app = create_app(registry, ServerSettings(max_body_bytes=1024))
    data = json.dumps(chat()).encode()
    full = data[:-1] + b" " * (1024 - len(data)) + b"}"
    announced = [(b"content-length", b"1024")]
    assert ask(app, full, headers=announced).status == ask(app, full).status == 200
    for headers in ([(b"content-length", b"1025")], []):
        answer = ask(app, full + b" ", headers=headers)
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("length", [b"-1", b"abc", b"", b"1e3", "٣".encode()], ids=ascii)
def test_a_nonsense_length_is_no_reason_to_fail(served: Any, length: bytes) -> None:
    assert ask(served, chat(), headers=[(b"content-length", length)]).status == 200

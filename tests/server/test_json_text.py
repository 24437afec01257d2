"""One set of rules for JSON, in a body and in a text of one; and an error that can be sent, whatever it quotes."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from asgi import CHAT, call
from fakes import chat, make_app
from hypothesis import given, strategies as st

from engine import InvalidFormat, InvalidParameter, Unsupported, VerbatimError
from server.errors import describe
from server.json_text import load_body, load_text, to_json

MOST = sys.float_info.max
RULES = [
    # what no JSON that is read here holds, words of the refusal
    ('{"a": 1, "a": 2}', "the field 'a' twice in one object"),
    ('{"a": NaN}', "NaN is not a JSON number"),
    ('{"a": [-Infinity]}', "-Infinity is not a JSON number"),
    ('{"a": "\\ud800"}', "half a surrogate pair: '\\ud800'"),
    ('{"\\udfff": 1}', "half a surrogate pair: '\\udfff'"),
    ('{"a": ' + "9" * 5000 + "}", "an integer of thousands of digits"),
    ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply; 100 levels are allowed"),
    ('{"a": ' + "[" * 100_000, "nested too deeply; 100 levels are allowed"),
    ('{"a": [' + "0," * 300_000 + "0]}", "more than 200000 values"),
    ("nonsense", "Expecting value"),
]
NAMES = [rule[1][:25] for rule in RULES]


@pytest.mark.parametrize(("text", "words"), RULES, ids=NAMES)
def test_a_text_is_read_by_the_rules_of_a_body(text: str, words: str) -> None:
    with pytest.raises((InvalidFormat, InvalidParameter)) as of_body:
        load_body(text.encode())
    with pytest.raises(ValueError) as of_text:
        load_text(text)
    assert words in of_body.value.message
    assert words in str(of_text.value)


def test_half_a_pair_is_refused_in_an_unescaped_text_too() -> None:
    with pytest.raises(ValueError, match="half a surrogate pair"):
        load_text('"\ud800"')


def of_structured(text: str) -> dict[str, Any]:
    return {"structured_outputs": {"json": text}}


@pytest.mark.parametrize(("text", "words"), RULES, ids=NAMES)
@pytest.mark.parametrize("name", ["guided_json", "json_schema", "structured_outputs.json"])
def test_a_schema_that_is_given_as_text_is_refused_by_name(name: str, text: str, words: str) -> None:
    form = of_structured(text) if "." in name else {name: text}
    answer = call(make_app(), chat(**form), path=CHAT)
    assert (answer.status, answer.error["param"]) == (422, name)
    assert words in answer.error["message"]
    assert "set_int_max_str_digits" not in answer.error["message"]


# -- numbers beyond a double ------------------------------------------------------------------------------------------


@given(st.sampled_from(["1e999", "-1e999", "1" + "0" * 400 + ".5", "-9.9e308", "1e-999"]))
def test_a_number_becomes_the_nearest_that_can_be_written_again(digits: str) -> None:
    for read in (load_text(f'{{"x": [{digits}]}}'), load_body(f'{{"x": [{digits}]}}'.encode())):
        [number] = read["x"]
        assert number == (0 if "e-" in digits else -MOST if digits.startswith("-") else MOST)
        assert json.loads(to_json(read)) == read


TOOLS = [{"type": "function", "function": {"name": "f"}}]
FUNCTION = {"type": "function", "name": "f"}
SAID = {"role": "user", "content": "hi"}
USED = {"type": "tool_use", "id": "call_1", "name": "f", "input": {"x": "HUGE"}}
ANSWERED = {"type": "tool_result", "tool_use_id": "call_1", "content": "ok"}
HUGE: dict[str, tuple[str, dict[str, Any]]] = {
    "metadata": ("/v1/responses", {"input": "hi", "metadata": {"x": "HUGE"}}),
    "parameters": ("/v1/responses", {"input": "hi", "tools": [{**FUNCTION, "parameters": {"x-note": "HUGE"}}]}),
    "format": (
        "/v1/responses",
        {"input": "hi", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"maximum": "HUGE"}}}},
    ),
    "arguments": (
        "/v1/chat/completions",
        {
            "tools": TOOLS,
            "messages": [
                SAID,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "HUGE"}}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "ok"},
            ],
        },
    ),
    "input": (
        "/v1/messages",
        {
            "max_tokens": 8,
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "messages": [
                SAID,
                {"role": "assistant", "content": [USED]},
                {"role": "user", "content": [ANSWERED]},
            ],
        },
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_no_body_fails_at_a_number_beyond_a_double(name: str) -> None:
    path, body = HUGE[name]
    text = json.dumps({"model": "fake", **body}).replace('"HUGE"', "1e999")
    answer = call(make_app(), text.encode(), path=path)
    # A server that keeps no conversations, or takes only texts, may refuse the field; none falls over it.
    assert answer.status < 500, answer.body
    assert b"Infinity" not in answer.body


# -- errors -----------------------------------------------------------------------------------------------------------

HALVES = st.sampled_from(["\ud800", "a\udfffb"])
NUMBERS = st.integers() | st.floats() | st.just(20_000).map(lambda bits: 1 << bits)
PLAIN = st.none() | st.booleans() | NUMBERS | st.text() | st.binary(max_size=3) | HALVES
ANY = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | HALVES, inner, max_size=3) | st.tuples(inner)
    ),
    max_leaves=8,
)
WORDS = st.text() | st.sampled_from(["\ud800", "\ud800" * 3000])


ERRORS = st.sampled_from([InvalidParameter, Unsupported])


@given(message=WORDS, param=st.none() | WORDS, code=WORDS, pointer=ANY, kind=ERRORS)
def test_every_error_can_be_sent(
    message: str, param: str | None, code: str, pointer: Any, kind: type[VerbatimError]
) -> None:
    status, body = describe(kind(message, param=param, code=code, pointer=pointer))
    told = json.dumps(body, allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert status == 422
    assert set(json.loads(told)["error"]) == {"message", "type", "param", "code", "pointer"}

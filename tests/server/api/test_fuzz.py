"""Whatever JSON arrives, the answer is one of the contract's: never a 500, never another shape, never silence."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import response_events
from asgi import Answer, call
from fakes import chat, complete, make_app
from hypothesis import example, given, settings, strategies as st

from server.api import fields
from server.api.completions.fields import COMPLETION
from server.api.messages.fields import COUNT, MESSAGE as MESSAGES
from server.api.responses.fields import INCLUDABLE, RESPONSES, ROLES
from server.api.tokenizer.fields import DETOKENIZE, TOKENIZE

pytestmark = pytest.mark.slow
RESPONSES_TRIED = int(os.environ.get("VERBATIM_FUZZ_REQUESTS", "200"))
"""Bodies of items that are tried; `VERBATIM_FUZZ_REQUESTS=5000` tries that many."""

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, -1, 2**63, 10**30, 1e308, 5e-324, "", "\ud800", "auto", "text", "user", "fake"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*sorted(fields.CHAT.known), "unknown", ""]
PART = st.fixed_dictionaries({}, optional={"type": st.just("text") | VALUES, "text": st.text(max_size=5) | VALUES})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(fields.ROLES) | VALUES,
        "content": st.text(max_size=8) | st.lists(PART, max_size=3) | VALUES,
        "name": VALUES,
        "tool_calls": VALUES,
        "other": VALUES,
    },
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(FIELDS, VALUES),
        "model": st.just("fake") | VALUES,
        "messages": st.lists(MESSAGE, max_size=2) | VALUES,
        "logit_bias": st.dictionaries(st.integers(-5, 2000).map(str) | st.text(max_size=3), SCALARS, max_size=3),
        "stream": st.booleans() | VALUES,
    },
)


PROMPTS = st.text(max_size=5) | st.lists(st.text(max_size=3) | st.integers(-2, 1001), max_size=3) | VALUES
PLAIN_FIELDS = [*sorted(COMPLETION.known), "unknown", ""]
OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    # path: a good body, and the fields
    "/v1/completions": (complete(), PLAIN_FIELDS),
    "/v1/responses": ({"model": "fake", "input": "a"}, [*sorted(RESPONSES.known), "unknown", ""]),
    "/tokenize": ({"prompt": "a"}, [*sorted(TOKENIZE.known), "unknown", ""]),
    "/v1/tokenize": ({"messages": [{"role": "user", "content": "a"}]}, sorted(TOKENIZE.known)),
    "/detokenize": ({"tokens": [1]}, [*sorted(DETOKENIZE.known), "unknown", ""]),
    "/v1/messages": (chat(), [*sorted(MESSAGES.known), "unknown", ""]),
    "/v1/messages/count_tokens": (chat(), [*sorted(COUNT.known), "unknown", ""]),
}

BLOCK = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "redacted_thinking", "image"]) | VALUES,
        "text": st.text(max_size=5) | VALUES,
        "thinking": st.text(max_size=5) | VALUES,
        "id": st.sampled_from(["a", "b"]) | VALUES,
        "tool_use_id": st.sampled_from(["a", "b"]) | VALUES,
        "name": st.just("ping") | VALUES,
        "input": st.dictionaries(st.text(max_size=2), SCALARS, max_size=2) | VALUES,
        "content": st.text(max_size=5) | st.lists(PART, max_size=2) | VALUES,
        "is_error": st.booleans() | VALUES,
        "cache_control": st.just({"type": "ephemeral"}) | VALUES,
    },
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | VALUES},
    optional={"content": st.text(max_size=5) | st.lists(BLOCK, max_size=3) | VALUES, "other": VALUES},
)
KIND = st.sampled_from(
    ["auto", "any", "tool", "none", "enabled", "disabled", "adaptive", "json_schema", "clear_thinking_20251015"]
)
OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        "type": KIND | VALUES,
        "name": st.just("ping") | VALUES,
        "input_schema": st.just({"type": "object"}) | VALUES,
        "budget_tokens": st.integers() | VALUES,
        "effort": st.sampled_from(["low", "max"]) | VALUES,
        "format": st.just({"type": "json_schema", "schema": {}}) | VALUES,
        "schema": st.just({}) | VALUES,
        "edits": st.lists(st.fixed_dictionaries({"type": KIND}), max_size=2) | VALUES,
        "other": VALUES,
    },
)
OF_MESSAGES = st.fixed_dictionaries(
    {"messages": st.lists(TURN, min_size=1, max_size=4)},
    optional={
        "system": st.text(max_size=5) | st.lists(PART, max_size=2) | VALUES,
        "tools": st.lists(OBJECTS, max_size=2) | VALUES,
        **dict.fromkeys(("tool_choice", "thinking", "output_config", "output_format", "context_management"), OBJECTS),
        "stream": st.booleans(),
    },
)


def check(answer: Answer) -> None:
    """Success in one of the two shapes, or an error in its one."""
    if answer.status != 200:
        assert answer.status in (400, 404, 413, 422)
        assert answer.error["code"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        if b"event: response.created" in answer.body:
            assert response_events.collected(response_events.read(answer.body))["status"] in ("completed", "incomplete")
        else:
            assert answer.events[-1] in ("[DONE]", {"type": "message_stop"})
    else:
        assert answer.json.get("object") in ("chat.completion", "text_completion", "response", None)


@pytest.fixture(scope="module")
def served() -> Any:
    """One application for all bodies: what one breaks, the next one sees."""
    return make_app()


@pytest.fixture(scope="module")
def strict_app() -> Any:
    return make_app(strict_params=True)


@given(body=BODIES)
@settings(max_examples=200, deadline=None)
def test_any_object(served: Any, body: dict[str, Any]) -> None:
    check(call(served, json.dumps(body).encode()))


@given(field=st.sampled_from(FIELDS), value=VALUES)
@settings(max_examples=300, deadline=None)
def test_one_odd_field_in_a_good_body(served: Any, field: str, value: Any) -> None:
    """Most random bodies fail at their first field; this reaches all the others."""
    check(call(served, json.dumps(chat(**{field: value})).encode()))


@pytest.mark.parametrize("path", OTHERS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_odd_fields_of_other_endpoints(served: Any, path: str, data: st.DataObject) -> None:
    body, names = OTHERS[path]
    odd = data.draw(st.dictionaries(st.sampled_from(names), VALUES | PROMPTS, max_size=2))
    check(call(served, json.dumps({**body, **odd}).encode(), path=path))


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@given(fields=OF_MESSAGES)
@settings(max_examples=300, deadline=None)
def test_any_message(served: Any, path: str, fields: dict[str, Any]) -> None:
    check(call(served, json.dumps({"model": "fake", **fields}).encode(), path=path))


@given(prompt=PROMPTS, stream=st.booleans(), echo=st.booleans(), logprobs=st.none() | st.integers(-1, 21))
@settings(max_examples=200, deadline=None)
def test_any_prompt(served: Any, prompt: Any, stream: bool, echo: bool, logprobs: int | None) -> None:
    body = complete(prompt=prompt, stream=stream, echo=echo, logprobs=logprobs)
    check(call(served, json.dumps(body).encode(), path="/v1/completions"))


TYPES = ["message", "reasoning", "function_call", "function_call_output", "item_reference", "function", "namespace"]
TYPES += ["input_text", "output_text", "reasoning_text", "text", "json_object", "json_schema", "allowed_tools", "x"]
WORDS = st.sampled_from(["", "a", "c1", "{}", "auto", "required", "none", *ROLES]) | VALUES
ENTRY = st.recursive(
    st.fixed_dictionaries({}, optional={"type": st.sampled_from(TYPES) | VALUES, "text": WORDS}),
    lambda inner: st.fixed_dictionaries(
        {"type": st.sampled_from(TYPES)},
        optional={
            **dict.fromkeys(("role", "call_id", "name", "namespace", "arguments", "id", "mode"), WORDS),
            **dict.fromkeys(("content", "output", "summary", "tools"), st.lists(inner, max_size=2) | WORDS),
            **dict.fromkeys(("format", "schema", "parameters"), inner | VALUES),
            "strict": st.booleans() | VALUES,
            "encrypted_content": st.sampled_from(["verbatim-text:aG0=", "verbatim-text:/w==", "gAAA"]) | VALUES,
        },
    ),
    max_leaves=4,
)
RESPONSE = st.fixed_dictionaries(
    {"model": st.just("fake"), "input": st.lists(ENTRY, max_size=4) | st.just("a")},
    optional={
        "tools": st.lists(ENTRY, max_size=2),
        "tool_choice": ENTRY | WORDS,
        "text": st.fixed_dictionaries({}, optional={"format": ENTRY}) | ENTRY,
        "reasoning": st.dictionaries(st.sampled_from(["effort", "summary", "x"]), WORDS, max_size=2),
        "include": st.lists(st.sampled_from(INCLUDABLE) | WORDS, max_size=2),
        "instructions": WORDS,
        "stream": st.booleans(),
        "top_logprobs": st.integers(-1, 3),
    },
)


@given(body=RESPONSE)
@settings(max_examples=RESPONSES_TRIED, deadline=None)
def test_any_items(served: Any, body: dict[str, Any]) -> None:
    check(call(served, json.dumps(body).encode(), path="/v1/responses"))


@given(body=st.binary(max_size=40) | VALUES.map(lambda v: json.dumps(v).encode()))
@example(b"\x00")
@example(b'{"model":"fake","messages":[{"role":"user","content":"\\u0000"}]}')
@settings(max_examples=200, deadline=None)
def test_any_bytes(served: Any, body: bytes) -> None:
    check(call(served, body))


@given(name=st.text(max_size=20), strict=st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_name_of_an_unknown_field(served: Any, strict_app: Any, name: str, strict: bool) -> None:
    answer = call(strict_app if strict else served, json.dumps(chat(**{f"x{name}": 1})).encode())
    check(answer)
    if answer.status == 200:
        assert not strict
        assert answer.headers["x-ignored-fields"].isascii()
        assert answer.headers["x-ignored-fields"].isprintable()

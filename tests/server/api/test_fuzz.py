"""Whatever JSON arrives, the answer is one of the contract's: never a 500, never another shape, never silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi import Answer, call
from fakes import chat, make_app
from hypothesis import example, given, settings, strategies as st

from server.api import fields

pytestmark = pytest.mark.slow

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
FIELDS = [*fields.CHAT.known, "unknown", ""]
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


def check(answer: Answer) -> None:
    """Success in one of the two shapes, or an error in its one."""
    if answer.status != 200:
        assert answer.status in (400, 404, 413, 422)
        assert answer.error["code"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.events[-1] == "[DONE]"
    else:
        assert answer.json["object"] == "chat.completion"


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

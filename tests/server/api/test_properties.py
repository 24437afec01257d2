"""Whatever arrives, a real engine stays well: random bodies in which most fields are good, so that they get far."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from asgi import begin
from hypothesis import given, settings, strategies as st
from test_fuzz import FIELDS, MESSAGE, VALUES, check

from engine import Registry
from server.app import create_app

pytestmark = pytest.mark.slow

CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
GOOD_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": CONTENT},
        optional={"name": CONTENT},
    ),
    min_size=1,
    max_size=3,
)
UNIT = st.floats(0, 1)
IDS = st.integers(0, 439)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 5e-324, 1e-30, 2]) | st.floats(0, 2),
    "top_p": UNIT,
    "top_k": st.integers(0, 500) | st.just(2**70),
    "min_p": UNIT,
    "n": st.integers(1, 4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": CONTENT.filter(bool) | st.lists(CONTENT.filter(bool), max_size=4),
    "stop_token_ids": st.lists(IDS, max_size=4),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "logit_bias": st.dictionaries(IDS.map(str), st.floats(-100, 100), max_size=4),
    "logprobs": st.just(True),
    "top_logprobs": st.integers(0, 20),
    "logprobs_mode": st.sampled_from(["raw", "processed"]),
    "min_tokens": st.integers(0, 4),
    "ignore_eos": st.booleans(),
    "return_token_ids": st.booleans(),
    "margins": st.booleans(),
    "prompt_logprobs": st.integers(0, 20),
    "prediction": st.fixed_dictionaries({"type": st.just("content"), "content": CONTENT}),
    "stream": st.booleans(),
    "user": CONTENT,
    "tools": st.just([]),
    "chat_template_kwargs": st.just({}),
}
SOUND = st.fixed_dictionaries({"messages": GOOD_MESSAGES, "max_tokens": st.integers(1, 4)}, optional=GOOD)
ODD = st.dictionaries(
    st.sampled_from([f for f in FIELDS if f not in ("max_tokens", "max_completion_tokens")]),
    VALUES | st.lists(MESSAGE, max_size=2),
    max_size=1,
)


@pytest.fixture(scope="module")
def served(registry: Registry) -> Any:
    return create_app(registry)


@pytest.fixture(scope="module", autouse=True)
def well(served: Any, registry: Registry) -> Any:
    """What was answered before all this is answered after it, and every block has come back."""
    engine = registry.get("tiny")
    good = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "seed": 1, "n": 2}
    before = ask(served, json.dumps(good).encode()).json["choices"]
    yield
    assert ask(served, json.dumps(good).encode()).json["choices"] == before
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)


def ask(app: Any, body: bytes) -> Any:
    async def main() -> Any:
        return await begin(app, body).ended(20)

    return asyncio.run(main())


@given(fields=SOUND)
@settings(max_examples=150, deadline=None)
def test_any_good_body_is_answered(served: Any, fields: dict[str, Any]) -> None:
    """Every mixture of values in their ranges: nothing that the table allows is refused or breaks a step."""
    if "top_logprobs" in fields:
        fields["logprobs"] = True
    fields["min_tokens"] = min(fields.get("min_tokens", 0), fields["max_tokens"])
    answer = ask(served, json.dumps({"model": "tiny", **fields}).encode())
    assert answer.status == 200, answer.body
    check(answer)
    if not fields.get("stream"):
        body = answer.json
        n = fields.get("n", 1)
        assert [c["index"] for c in body["choices"]] == list(range(n))
        assert n * fields["min_tokens"] <= body["usage"]["completion_tokens"] <= n * fields["max_tokens"]
        assert {c["finish_reason"] for c in body["choices"]} <= {"stop", "length"}


@given(fields=SOUND, odd=ODD)
@settings(max_examples=150, deadline=None)
def test_one_odd_field_among_good_ones(served: Any, fields: dict[str, Any], odd: dict[str, Any]) -> None:
    check(ask(served, json.dumps({"model": "tiny", **fields, **odd}).encode()))


@given(fields=SOUND, data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_good_body_with_broken_bytes(served: Any, fields: dict[str, Any], data: st.DataObject) -> None:
    body = json.dumps({"model": "tiny", **fields}, ensure_ascii=False).encode()
    at = data.draw(st.integers(0, len(body)))
    gone = data.draw(st.integers(0, 3))
    junk = data.draw(st.binary(max_size=3) | st.sampled_from([b"{", b"]", b'"', b"\\", b"e9", b"null", b"\\ud800"]))
    check(ask(served, body[:at] + junk + body[at + gone :]))

"""`/tokenize`, `/detokenize` and `/tokenizer_info` over an engine that follows a script."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi import Answer, call
from fakes import FakeEngine, make_app
from ledger_for_tests import Clock

from engine import ModelStatus
from server.accounts.charging import Meter
from server.ledger.records import Limits
from server.ledger.store import Ledger

ROOTS = ["", "/v1", "/api/v1"]


def ask(app: Any, name: str, body: dict[str, Any], root: str = "", **how: Any) -> Answer:
    return call(app, body, path=f"{root}/{name}", **how)


@pytest.mark.parametrize("root", ROOTS)
def test_tokenize(root: str) -> None:
    body = {"prompt": "abc", "return_token_strs": True}
    assert ask(make_app(), "tokenize", body, root).json == {
        "count": 3,
        "max_model_len": 64,
        "tokens": [97, 98, 99],
        "token_strs": ["a", "b", "c"],
    }
    assert ask(make_app(), "tokenize", {"model": "fake", "prompt": ""}, root).json["tokens"] == []


@pytest.mark.parametrize("root", ROOTS)
def test_detokenize(root: str) -> None:
    assert ask(make_app(), "detokenize", {"tokens": [97, 98]}, root).json == {"prompt": "ab"}
    assert ask(make_app(), "detokenize", {"tokens": []}, root).json == {"prompt": ""}


@pytest.mark.parametrize("root", ROOTS)
def test_the_tokenizer_is_described(root: str) -> None:
    answer = call(make_app(), path=f"{root}/tokenizer_info", query=b"model=fake")
    assert answer.json == call(make_app(), path=f"{root}/tokenizer_info").json
    assert answer.json["eos_token"] == "<end>"
    assert answer.json["tokenizer_class"] == "FakeTokenizer"


def test_messages_are_handed_on_whole() -> None:
    engine = FakeEngine()
    tool = {"type": "function", "function": {"name": "f"}}
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "x": 1}],
        "tools": [tool],
        "add_generation_prompt": False,
        "chat_template_kwargs": {"a": 1},
    }
    answer = ask(make_app(engine), "tokenize", body)
    assert answer.json["count"] == 5
    assert answer.headers["x-ignored-fields"] == "messages.0.x"
    [request] = engine.requests
    assert [message.content for message in request.messages or ()] == ["a"]
    assert [tool.name for tool in request.tools] == ["f"]
    assert (request.add_generation_prompt, request.chat_template_kwargs) == (False, {"a": 1})


FORMAT, PARAMETER, UNSUPPORTED, MISSING = (
    "invalid_format",
    "invalid_parameter",
    "unsupported_parameter",
    "missing_field",
)
TURN = [{"role": "user", "content": "a"}]
REFUSED = [
    # endpoint, body, status, param, code
    ("tokenize", {}, 400, "prompt", MISSING),
    ("tokenize", {"prompt": "a", "messages": TURN}, 422, "messages", PARAMETER),
    ("tokenize", {"prompt": ["a"]}, 400, "prompt", FORMAT),
    ("tokenize", {"prompt": "a", "tools": [{}]}, 422, "tools", PARAMETER),
    ("tokenize", {"messages": []}, 422, "messages", PARAMETER),
    ("tokenize", {"messages": [{"role": "x"}]}, 422, "messages.0.role", PARAMETER),
    ("tokenize", {"messages": TURN, "add_special_tokens": True}, 422, "add_special_tokens", UNSUPPORTED),
    ("tokenize", {"prompt": "a", "continue_final_message": True}, 422, "continue_final_message", PARAMETER),
    (
        "tokenize",
        {"messages": TURN, "continue_final_message": True, "add_generation_prompt": True},
        422,
        "add_generation_prompt",
        PARAMETER,
    ),
    ("tokenize", {"prompt": "a", "return_token_strs": 1}, 400, "return_token_strs", FORMAT),
    ("tokenize", {"prompt": "a", "model": "other"}, 404, "model", "model_not_found"),
    ("tokenize", {"prompt": "a", "model": 1}, 400, "model", FORMAT),
    ("detokenize", {}, 400, "tokens", MISSING),
    ("detokenize", {"tokens": "a"}, 400, "tokens", FORMAT),
    ("detokenize", {"tokens": [1, "a"]}, 400, "tokens.1", FORMAT),
    ("detokenize", {"tokens": [True]}, 400, "tokens.0", FORMAT),
    ("detokenize", {"tokens": [1, 1000]}, 422, "tokens.1", PARAMETER),
    ("detokenize", {"tokens": [1, -1]}, 422, "tokens.1", PARAMETER),
]


@pytest.mark.parametrize(("name", "body", "status", "param", "code"), REFUSED, ids=lambda v: json.dumps(v)[:50])
def test_bad_bodies_are_refused_by_name(name: str, body: dict[str, Any], status: int, param: str, code: str) -> None:
    answer = ask(make_app(), name, body)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (status, param, code)


def test_a_model_must_be_named_where_there_are_several() -> None:
    app = make_app(FakeEngine(), ModelStatus("slow", "loading", "reading"))
    for answer in (ask(app, "tokenize", {"prompt": "a"}), call(app, path="/tokenizer_info")):
        assert (answer.status, answer.error["code"]) == (400, "missing_field")
        assert "fake, slow" in answer.error["message"]
    assert ask(app, "tokenize", {"prompt": "a", "model": "fake"}).status == 200
    assert ask(app, "tokenize", {"prompt": "a", "model": "slow"}).status == 503


def test_tokens_cost_nothing_and_count_as_requests(ledger: Ledger, clock: Clock) -> None:
    """A key without a balance may count tokens; one over its requests of a minute may not; nobody else may at all."""
    poor = ledger.create_key("poor", balance=0).secret
    quick = ledger.create_key("quick", limits=Limits(requests_per_minute=2)).secret
    other = ledger.create_key("other", models=["other"]).secret
    meter = Meter(ledger, {}, clock)
    app = make_app(meter=meter)

    def tokens(secret: str | None) -> int:
        headers = [] if secret is None else [(b"authorization", f"Bearer {secret}".encode())]
        return ask(app, "tokenize", {"model": "fake", "prompt": "a"}, headers=headers).status

    assert [tokens(poor), tokens(None), tokens(other)] == [200, 401, 404]
    assert [tokens(quick) for _ in range(3)] == [200, 200, 429]
    assert ledger.usage() == []
    meter._worker.shutdown()
    meter._reporter.shutdown()

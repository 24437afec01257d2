"""Thoughts over HTTP: apart from the answer, the same in a stream, and sent back without harm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, begin

from engine import ModelConfig, Registry
from server.app import create_app

HELLO = [{"role": "user", "content": "Hi"}]
OPENED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
BASE: dict[str, Any] = {"messages": HELLO, "max_tokens": 60, "seed": 4, "thinking_budget": 10, "ignore_eos": True}


@pytest.fixture(scope="module")
def app(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    template = tmp_path_factory.mktemp("template") / "thinks.jinja"
    template.write_text(OPENED)
    common: dict[str, Any] = {"path": tiny("qwen3"), "cache_size": "8MiB", "context_length": 256, "threads": 1}
    registry = Registry([ModelConfig(id="thinks", chat_template=template, **common), ModelConfig(id="plain", **common)])
    registry.start()
    registry.wait()
    yield create_app(registry)
    registry.close()


def ask(app: Any, **fields: Any) -> Answer:
    async def main() -> Answer:
        return await begin(app, {"model": "thinks", **BASE, **fields}).ended(30)

    return asyncio.run(main())


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"logprobs": True}, {"return_token_ids": True}, {"max_tokens": 6}])
def test_a_stream_has_the_same_thoughts_and_the_same_answer(app: Any, extra: dict[str, Any]) -> None:
    whole = ask(app, **extra).json
    *events, last, done = ask(app, stream=True, stream_options={"include_usage": True}, **extra).events
    assert done == "[DONE]"
    assert last["usage"]["completion_tokens_details"] == whole["usage"]["completion_tokens_details"]
    for choice in whole["choices"]:
        deltas = [c["delta"] for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(d.get("content") or "" for d in deltas) == choice["message"]["content"]
        thoughts = "".join(d.get("reasoning_content") or "" for d in deltas)
        assert thoughts == choice["message"]["reasoning_content"]
        assert thoughts
        assert "think" not in thoughts + choice["message"]["content"]
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 6


def test_thoughts_come_before_the_answer(app: Any) -> None:
    *events, _ = ask(app, stream=True).events
    kinds = [key for e in events for c in e["choices"] for key in c["delta"] if key in ("reasoning_content", "content")]
    assert "reasoning_content" not in kinds[len(kinds) - kinds[::-1].index("reasoning_content") :]
    first_said = next(i for i, e in enumerate(events) if any(c["delta"].get("content") for c in e["choices"]))
    last_thought = max(
        i for i, e in enumerate(events) if any(c["delta"].get("reasoning_content") for c in e["choices"])
    )
    assert last_thought <= first_said


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_earlier_thoughts_are_handed_to_the_template(app: Any, name: str) -> None:
    def prompt(**fields: Any) -> int:
        messages = [*HELLO, {"role": "assistant", "content": "Yes.", **fields}, *HELLO]
        answer = ask(app, messages=messages)
        assert answer.status == 200, answer.body
        assert "x-ignored-fields" not in answer.headers
        return int(answer.json["usage"]["prompt_tokens"])

    assert prompt(**{name: "because of this and that"}) > prompt()
    assert prompt(**{name: None}) == prompt()


def test_thoughts_of_a_user_are_no_field(app: Any) -> None:
    answer = ask(app, messages=[{**HELLO[0], "reasoning": "x"}])
    assert answer.headers["x-ignored-fields"] == "messages.0.reasoning"


@pytest.mark.parametrize(
    ("model", "effort", "status"),
    [
        ("thinks", "none", 422),
        ("thinks", "high", 200),
        ("plain", "none", 200),
        ("plain", "high", 200),
        ("plain", "x", 422),
    ],
)
def test_an_effort_is_honoured_refused_or_named(app: Any, model: str, effort: str, status: int) -> None:
    budget = None if model == "plain" else 5
    answer = ask(app, model=model, reasoning_effort=effort, thinking_budget=budget)
    assert answer.status == status, answer.body
    if status == 200:
        assert answer.headers["x-ignored-fields"] == "reasoning_effort"
    else:
        assert answer.error["param"] == "reasoning_effort"


def test_a_budget_for_a_model_that_does_not_think(app: Any) -> None:
    answer = ask(app, model="plain")
    assert (answer.status, answer.error["param"], answer.error["code"]) == (
        422, "thinking_budget", "unsupported_parameter",
    )  # fmt: skip

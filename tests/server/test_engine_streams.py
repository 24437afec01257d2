"""A stream of a real engine is the synchronous answer in pieces; pieces are whole characters and whole JSON.

The random model speaks random bytes: most of its text is cut characters, which no script invents as well.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from asgi import Answer, begin
from test_streaming import joined

from engine import AsyncEngine, Registry
from server.app import create_app

pytestmark = pytest.mark.slow

HELLO = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 30, **fields}


def ask(app: Any, **fields: Any) -> Answer:
    async def main() -> Answer:
        return await begin(app, chat(**fields)).ended(20)

    return asyncio.run(main())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "to the end": {"max_tokens": 100, "ignore_eos": True},
    "one token": {"max_tokens": 1},
    "four choices": {"n": 4},
    "greedy choices": {"n": 3, "temperature": 0},
    "logprobs": {"logprobs": True, "top_logprobs": 5},
    "processed logprobs": {"logprobs": True, "top_logprobs": 3, "logprobs_mode": "processed", "top_k": 4},
    "token ids": {"return_token_ids": True, "n": 2},
    "penalties": {"frequency_penalty": 1.5, "presence_penalty": -0.5, "repetition_penalty": 1.1},
    "a schema": {
        "guided_json": {
            "type": "object",
            "properties": {"left": {"type": "boolean"}},
            "required": ["left"],
            "additionalProperties": False,
        },
        "n": 2,
        "return_token_ids": True,
    },
    "a choice of words, logprobs": {"guided_choice": ["blue", "black", "é"], "logprobs": True, "top_logprobs": 2},
    "everything": {"n": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "min_p": 0.01, "top_p": 0.9},
}


def check(app: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Ask both ways; the whole answer, if they agree."""
    whole = ask(app, **fields).json
    answer = ask(app, stream=True, stream_options={"include_usage": True}, **fields)
    *events, last, done = answer.events
    assert done == "[DONE]"
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == whole["usage"][name]
    assert all(event["usage"] is None for event in events)
    assert {(e["seed"], e["system_fingerprint"], e["model"]) for e in events} == {
        (whole["seed"], whole["system_fingerprint"], "tiny")
    }
    for choice, mine in zip(whole["choices"], joined(events, len(whole["choices"])), strict=True):
        assert mine["content"] == choice["message"]["content"]
        assert mine["finish_reason"] == choice["finish_reason"]
        assert mine["logprobs"] == choice["logprobs"]
        assert mine["token_ids"] == choice.get("token_ids", [])
    return dict(whole)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_both_ways_say_the_same(registry: Registry, engine: AsyncEngine, name: str, seed: int) -> None:
    fields = {"seed": seed, **CASES[name]}
    whole = check(create_app(registry), fields)
    assert len(whole["choices"]) == fields.get("n", 1)
    if fields.get("logprobs"):
        entries = sum(len(c["logprobs"]["content"]) for c in whole["choices"])
        assert entries == whole["usage"]["completion_tokens"], "an entry for every token, also for those held back"


@pytest.mark.parametrize("limit", [4, 60])
def test_what_a_schema_could_not_enforce_is_told_in_both(registry: Registry, engine: AsyncEngine, limit: int) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "set", "schema": schema}}
    app = create_app(registry)
    fields = {"response_format": form, "seed": 1, "max_tokens": limit}
    [choice] = ask(app, **fields).json["choices"]
    *_, last, _ = ask(app, stream=True, **fields).events
    assert choice["schema_error"]
    assert last["choices"][0]["schema_error"] == choice["schema_error"]
    assert choice["finish_reason"] == last["choices"][0]["finish_reason"] == ("length" if limit == 4 else "stop")


@pytest.mark.parametrize("seed", range(6))
def test_a_stop_string_never_shows_not_even_a_part_of_it(registry: Registry, engine: AsyncEngine, seed: int) -> None:
    app = create_app(registry)
    free = ask(app, seed=seed, ignore_eos=True).json["choices"][0]["message"]["content"]
    at = len(free) // 2
    for length in (1, 2, 5):
        stop = free[at : at + length]
        whole = check(app, {"seed": seed, "ignore_eos": True, "stop": [stop, "never said"], "logprobs": True})
        [choice] = whole["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == free[: free.index(stop)]
        assert len(choice["logprobs"]["content"]) == whole["usage"]["completion_tokens"]


def test_every_piece_is_whole(registry: Registry, engine: AsyncEngine) -> None:
    """Each send is events from the first byte to the last: a client may decode and parse it by itself."""

    async def main() -> list[bytes]:
        exchange = begin(create_app(registry), chat(stream=True, max_tokens=100, ignore_eos=True, seed=4, n=2))
        await exchange.ended(20)
        return [message["body"] for message in exchange.messages[1:]]

    pieces = asyncio.run(main())
    assert len(pieces) > 10, "nothing was streamed"
    for piece in pieces:
        text = piece.decode("utf-8")
        assert text.endswith("\n\n")
        for event in text.removesuffix("\n\n").split("\n\n"):
            assert event == "data: [DONE]" or json.loads(event.removeprefix("data: "))["object"]


def test_a_seed_that_was_drawn_repeats_the_answer(registry: Registry, engine: AsyncEngine) -> None:
    app = create_app(registry)
    drawn = [ask(app).json for _ in range(2)]
    assert drawn[0]["choices"] != drawn[1]["choices"]
    for reply in drawn:
        assert ask(app, seed=reply["seed"]).json["choices"] == reply["choices"]


def test_in_a_crowd_as_alone(registry: Registry, engine: AsyncEngine) -> None:
    app = create_app(registry)
    fields = [{"seed": i, "stream": bool(i % 2), "n": 1 + i % 3, "logprobs": True} for i in range(8)]

    def choices(answer: Answer, n: int) -> Any:
        if not answer.headers["content-type"].startswith("text/event-stream"):
            return [(c["message"]["content"], c["logprobs"]) for c in answer.json["choices"]]
        return [(c["content"], c["logprobs"]) for c in joined(answer.events[:-1], n)]

    async def crowd() -> list[Answer]:
        exchanges = [begin(app, chat(**f)) for f in fields]
        return [await exchange.ended(20) for exchange in exchanges]

    alone = [choices(ask(app, **f), f["n"]) for f in fields]
    assert [choices(a, f["n"]) for a, f in zip(asyncio.run(crowd()), fields, strict=True)] == alone

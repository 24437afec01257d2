"""`POST /completions`, over an engine that follows a script: what is asked, what is written, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from asgi import Answer, begin, call, run
from fakes import HELLO, SILENT, FakeEngine, Step, complete, make_app, output, word_by_word

from engine import ChoiceDelta, OutOfMemory, PreparedRequest
from server.api import openapi
from server.api.completions.fields import COMPLETION

PATH = "/v1/completions"


def ask(app: Any, **fields: Any) -> Answer:
    return call(app, complete(**fields), path=PATH)


def joined(events: list[Any], count: int) -> list[dict[str, Any]]:
    """The choices of a stream, put together from its chunks."""
    found: list[dict[str, Any]] = [{"text": "", "logprobs": None, "finish_reason": None} for _ in range(count)]
    for event in events:
        for part in event["choices"]:
            mine = found[part["index"]]
            mine["text"] += part["text"]
            mine["finish_reason"] = part["finish_reason"] or mine["finish_reason"]
            for name in ("token_ids", "margins"):
                if name in part:
                    mine[name] = mine.get(name, []) + part[name]
            if "prompt_logprobs" in part:
                assert "prompt_logprobs" not in mine
                mine["prompt_logprobs"] = part["prompt_logprobs"]
            if part["logprobs"] is not None:
                known = mine["logprobs"] or {name: [] for name in part["logprobs"]}
                mine["logprobs"] = {name: known[name] + part["logprobs"][name] for name in known}
    return found


# -- the shape -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_a_completion(prefix: str) -> None:
    answer = call(make_app(), complete(), path=prefix + PATH)
    assert answer.status == 200
    assert answer.json.pop("id").startswith("cmpl-")
    body = {name: value for name, value in answer.json.items() if name not in ("id", "created")}
    assert body == {
        "object": "text_completion",
        "model": "fake",
        "system_fingerprint": "fp_fake",
        "seed": 77,
        "choices": [{"index": 0, "text": "Hello wörld!", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
    }


ASKED = [
    {},
    {"n": 2, "logprobs": 2},
    {"prompt": ["ab", "cde"], "n": 2, "logprobs": 0, "echo": True},
    {"prompt": [[1, 2], [3], [4, 5, 6]], "return_token_ids": True, "margins": True},
    {"prompt": [7, 8], "echo": True},
    {"prompt": ["ab", "cd"], "prompt_logprobs": 1},
    {"prompt": "abc", "prompt_logprobs": 1, "echo": True, "logprobs": 3, "n": 3},
]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("fields", ASKED, ids=lambda v: json.dumps(v)[:50])
def test_the_chunks_of_a_stream_are_the_synchronous_answer(fields: dict[str, Any], usage: bool) -> None:
    app = make_app()
    whole = ask(app, **fields).json
    answer = ask(app, **fields, stream=True, stream_options={"include_usage": usage})
    *events, done = answer.events
    assert done == "[DONE]"
    if usage:
        *events, last = events
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all((event["usage"] is None) if usage else ("usage" not in event) for event in events)
    count = len(whole["choices"])
    assert joined(events, count) == [{k: v for k, v in c.items() if k != "index"} for c in whole["choices"]]
    assert {event["object"] for event in events} == {"text_completion"}


def test_several_prompts_are_numbered_prompt_by_prompt() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        text = "".join(chr(i) for i in request.prompt_token_ids)
        deltas = [ChoiceDelta(c, f"{text}{c}", (1,), None, "stop") for c in range(request.params.n)]
        yield output(request, deltas, request.params.n, finished=True)

    engine = FakeEngine(script)
    body = ask(make_app(engine), prompt=["x", "y", "z"], n=2).json
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate(["x0", "x1", "y0", "y1", "z0", "z1"]))
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 6
    ids = [request.request_id for request in engine.requests]
    assert ids == [body["id"], f"{body['id']}-1", f"{body['id']}-2"]
    assert [request.sampling.get("seed") for request in engine.requests] == [None, 77, 77]


def test_logprobs_are_four_lists() -> None:
    found = ask(make_app(), logprobs=2).json["choices"][0]["logprobs"]
    assert found["tokens"] == ["Hel", "lo", " wörld", "!"]
    assert found["token_logprobs"] == [-1.0, -1 / 2, -1 / 3, -1 / 4]
    assert found["text_offset"] == [0, 3, 5, 11]
    assert found["top_logprobs"][1] == {"r0": -1.0, "r1": -2.0, "lo": -0.5}


def test_an_echo_begins_with_the_prompt_and_its_logprobs() -> None:
    [choice] = ask(make_app(), echo=True, logprobs=1).json["choices"]
    assert choice["text"] == "abcHello wörld!"
    assert "prompt_logprobs" not in choice
    found = choice["logprobs"]
    assert found["tokens"] == ["a", "b", "c", "Hel", "lo", " wörld", "!"]
    assert found["token_logprobs"][:2] == [None, -1 / (ord("b") + 1)]
    assert found["top_logprobs"][:2] == [None, {"r0": -1.0, "b": -1 / (ord("b") + 1)}]
    assert found["text_offset"] == [0, 1, 2, 3, 6, 8, 14]


def test_prompt_logprobs_are_those_of_vllm() -> None:
    [choice] = ask(make_app(), prompt="ab", prompt_logprobs=2).json["choices"]
    b = {"logprob": -1 / (ord("b") + 1), "rank": 3, "decoded_token": "b"}
    rivals = {str(i): {"logprob": -float(i + 1), "rank": i + 1, "decoded_token": f"r{i}"} for i in range(2)}
    assert choice["prompt_logprobs"] == [None, {str(ord("b")): b, **rivals}]
    assert list(choice["prompt_logprobs"][1]) == [str(ord("b")), "0", "1"]


def test_the_engine_is_asked_for_as_many_alternatives_as_are_shown() -> None:
    engine = FakeEngine()
    [choice] = ask(make_app(engine), prompt="ab", prompt_logprobs=1, echo=True, logprobs=3).json["choices"]
    assert engine.requests[0].sampling["prompt_logprobs"] == 3
    assert len(choice["prompt_logprobs"][1]) == 2
    assert len(choice["logprobs"]["top_logprobs"][1]) == 4


def test_a_completion_has_sixteen_tokens_unless_it_says_otherwise() -> None:
    engine = FakeEngine()
    app = make_app(engine)
    for fields in ({}, {"max_tokens": None}, {"max_tokens": 0}, {"max_tokens": 5}):
        assert ask(app, **fields).status == 200
    assert [request.sampling["max_tokens"] for request in engine.requests] == [16, 16, 0, 5]


def test_what_the_engine_is_given() -> None:
    engine = FakeEngine()
    fields = {"suffix": "", "best_of": 2, "n": 2, "stop": ["x"], "guided_regex": "a+", "cache_salt": "s", "user": "u"}
    assert ask(make_app(engine), **fields, add_special_tokens=False, response_format=None).status == 200
    [request] = engine.requests
    assert (request.prompt, request.messages, request.suffix) == ("abc", None, None)
    assert (request.add_special_tokens, request.cache_salt) == (False, "s")
    assert request.constraint is not None
    assert request.constraint.value == "a+"
    assert request.sampling == {"n": 2, "stop": ["x"], "max_tokens": 16}


# -- what is refused -------------------------------------------------------------------------------------------------

FORMAT, PARAMETER, UNSUPPORTED = "invalid_format", "invalid_parameter", "unsupported_parameter"
REFUSED = [
    # fields, status, param, code, words
    ({"prompt": None}, 400, "prompt", FORMAT, "a string or a list, not null"),
    ({"prompt": 5}, 400, "prompt", FORMAT, "a string or a list"),
    ({"prompt": []}, 422, "prompt", PARAMETER, "empty list"),
    ({"prompt": [None]}, 400, "prompt.0", FORMAT, "text, token ids"),
    ({"prompt": ["a", 1]}, 400, "prompt.1", FORMAT, "a string, like prompt.0, not a number, 1"),
    ({"prompt": [1, "a"]}, 400, "prompt.1", FORMAT, "an integer"),
    ({"prompt": [True]}, 400, "prompt.0", FORMAT, "text, token ids"),
    ({"prompt": [1, True]}, 400, "prompt.1", FORMAT, "an integer"),
    ({"prompt": [[1], [2.5]]}, 400, "prompt.1.0", FORMAT, "an integer"),
    ({"prompt": [[1], "a"]}, 400, "prompt.1", FORMAT, "a list"),
    ({"prompt": [[1], []]}, 422, "prompt.1", PARAMETER, "no token"),
    ({"prompt": [-1]}, 422, "prompt", PARAMETER, "-1 is not a token"),
    ({"prompt": [[1], [1000]]}, 422, "prompt.1", PARAMETER, "1000 is not a token"),
    ({"prompt": ["a"] * 1025}, 422, "prompt", PARAMETER, "1024 prompts, not 1025"),
    ({"prompt": ["a"] * 101}, 422, "prompt", PARAMETER, "at most 100 prompts here"),
    ({"logprobs": True}, 400, "logprobs", FORMAT, "an integer"),
    ({"logprobs": 21}, 422, "logprobs", PARAMETER, "between 0 and 20, not 21"),
    ({"logprobs": -1}, 422, "logprobs", PARAMETER, "between 0 and 20, not -1"),
    ({"max_tokens": -2}, 422, "max_tokens", PARAMETER, "at least 0"),
    ({"echo": 1}, 400, "echo", FORMAT, "true or false"),
    ({"echo": True, "suffix": "x"}, 422, "suffix", PARAMETER, "cannot be combined"),
    ({"suffix": 1}, 400, "suffix", FORMAT, "a string"),
    ({"best_of": 3}, 422, "best_of", UNSUPPORTED, "1 or n, 1"),
    ({"best_of": True}, 400, "best_of", FORMAT, "an integer"),
    ({"n": 17}, 422, "n", PARAMETER, "at most 16"),
    ({"messages": []}, 422, "messages", UNSUPPORTED, "not supported"),
    ({"tools": [{}]}, 422, "tools", UNSUPPORTED, "not supported"),
    ({"prediction": {}}, 422, "prediction", UNSUPPORTED, "not supported"),
    ({"thinking_budget": 3}, 422, "thinking_budget", UNSUPPORTED, "not supported"),
    ({"max_completion_tokens": 3}, 422, "max_completion_tokens", UNSUPPORTED, "not supported"),
    ({"use_beam_search": True}, 422, "use_beam_search", UNSUPPORTED, "not supported"),
    ({"prompt_logprobs": -1}, 422, "prompt_logprobs", PARAMETER, "between 0 and 20"),
    ({"add_special_tokens": "yes"}, 400, "add_special_tokens", FORMAT, "true or false"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, 422, "guided_choice", PARAMETER, "cannot be combined"),
    ({"stream_options": {}}, 422, "stream_options", PARAMETER, "stream: true"),
]


@pytest.mark.parametrize(("fields", "status", "param", "code", "words"), REFUSED, ids=lambda v: json.dumps(v)[:40])
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], status: int, param: str, code: str, words: str) -> None:
    engine = FakeEngine()
    answer = ask(make_app(engine), **fields)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (status, param, code)
    assert words in answer.error["message"]
    assert engine.open == {}


def test_a_prompt_is_required() -> None:
    answer = call(make_app(), {"model": "fake"}, path=PATH)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "prompt", "missing_field")


def test_unknown_fields_are_named_in_a_header() -> None:
    answer = ask(make_app(), foo=1, bar=2, response_format={"type": "text", "x": 1})
    assert answer.headers["x-ignored-fields"] == "foo, bar, response_format.x"


def test_the_document_lists_what_is_honoured() -> None:
    document = make_app().openapi()
    described = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]
    assert set(described["schema"]["properties"]) == COMPLETION.honoured.keys()
    assert described["schema"]["required"] == ["model", "prompt"]
    assert call(make_app(), {**openapi.EXAMPLES["completion"], "model": "fake"}, path=PATH).status == 200


# -- several requests as one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_all_prompts_are_dropped_when_the_client_leaves(stream: bool) -> None:
    engine = FakeEngine(SILENT)

    async def leave() -> None:
        exchange = begin(make_app(engine), complete(prompt=["a", "b", "c"], stream=stream), path=PATH)
        await exchange.until(lambda: len(engine.open) == 3)
        exchange.disconnect()
        assert exchange.task
        await exchange.task

    run(leave())
    assert engine.open == {}
    assert len(engine.freed) == 3


def test_all_prompts_have_a_place_or_none() -> None:
    engine = FakeEngine(SILENT, limit=2)
    answer = ask(make_app(engine), prompt=["a", "b", "c"])
    assert (answer.status, answer.error["code"]) == (503, "queue_full")
    assert engine.open == {}
    assert len(engine.freed) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_one_prompt_ends_all(stream: bool) -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        if request.prompt_token_ids == (ord("b"),):
            yield 0.05
            yield output(request, [], 0, finished=True, error=OutOfMemory("no room"))
        yield output(request, [ChoiceDelta(0, "x", (1,))], 1)
        yield None

    engine = FakeEngine(script)
    answer = ask(make_app(engine), prompt=["a", "b", "c"], stream=stream)
    error = answer.events[-1]["error"] if stream else answer.error
    assert error["code"] == "out_of_memory"
    assert engine.open == {}


def test_prompts_that_end_at_different_times() -> None:
    def script(request: PreparedRequest) -> Iterable[Step]:
        words = ["w"] * request.prompt_token_ids[0]
        yield from word_by_word(*words)(request)

    app = make_app(FakeEngine(script))
    lengths = [5, 1, 9, 2]
    fields = {"prompt": [[i] for i in lengths]}
    whole = ask(app, **fields).json
    assert [choice["text"] for choice in whole["choices"]] == ["w" * i for i in lengths]
    assert whole["usage"]["completion_tokens"] == sum(lengths)
    *events, _ = ask(app, **fields, stream=True).events
    assert [choice["text"] for choice in joined(events, 4)] == ["w" * i for i in lengths]


def test_many_prompts_at_once() -> None:
    prompts = [f"p{i}" for i in range(100)]
    body = ask(make_app(FakeEngine(HELLO)), prompt=prompts, echo=True).json
    assert [choice["text"] for choice in body["choices"]] == [f"{p}Hello wörld!" for p in prompts]


def test_completions_and_chat_run_side_by_side() -> None:
    from fakes import chat

    app = make_app(FakeEngine(HELLO))

    async def crowd() -> list[Answer]:
        plain = [begin(app, complete(prompt=["a", "b"], stream=bool(i % 2)), path=PATH) for i in range(10)]
        return [await e.ended() for e in [*plain, begin(app, chat())]]

    assert {answer.status for answer in asyncio.run(crowd())} == {200}

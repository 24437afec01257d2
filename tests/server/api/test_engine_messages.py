"""Messages of a real engine: whole and streamed, with tools, thoughts, forms and stop sequences; Anthropic's client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic, APIStatusError
from asgi import Answer, call
from message_shapes import COUNT, ask, count_of, error_of, message_of
from wire_client import serving

from engine import ModelConfig, Registry, read_receipt, reply_difference
from server.app import create_app

OPENED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
SWITCH: dict[str, Any] = {
    "name": "switch",
    "description": "A switch.",
    "input_schema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def app(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    template = tmp_path_factory.mktemp("template") / "thinks.jinja"
    template.write_text(OPENED)
    common: dict[str, Any] = {"path": tiny("qwen3"), "cache_size": "8MiB", "context_length": 1024, "threads": 1}
    registry = Registry([ModelConfig(id="thinks", chat_template=template, **common), ModelConfig(id="fake", **common)])
    registry.start()
    registry.wait()
    yield create_app(registry)
    registry.close()


BODIES: dict[str, dict[str, Any]] = {
    "text": {"seed": 1},
    "greedy": {"temperature": 0},
    "no tokens": {"max_tokens": 0},
    "one token": {"max_tokens": 1, "seed": 3},
    "thoughts": {
        "model": "thinks", "seed": 4, "thinking": {"type": "enabled", "budget_tokens": 10}, "ignore_eos": True,
        "max_tokens": 40,
    },
    "only thoughts": {"model": "thinks", "seed": 4, "max_tokens": 6, "ignore_eos": True},
    "a call": {"tools": [SWITCH], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "seed": 1},
    "calls": {"tools": [SWITCH], "tool_choice": {"type": "tool", "name": "switch"}, "seed": 2},
    "tools that nobody must call": {"tools": [SWITCH], "seed": 2},
    "a form": {"output_config": {"format": {"type": "json_schema", "schema": {"enum": [1, 2]}}}, "seed": 1},
    "stop sequences": {"stop_sequences": ["a", "e", "o", " "], "seed": 5, "max_tokens": 60},
}  # fmt: skip


@pytest.mark.parametrize("fields", BODIES.values(), ids=BODIES)
def test_a_stream_is_the_whole_message(app: Any, fields: dict[str, Any]) -> None:
    fields = {"max_tokens": 150, "receipt": True, "seed": 6, **fields}
    whole, streamed = (message_of(ask(app, stream=stream, **fields)) for stream in (False, True))
    for message in (whole, streamed):
        receipt = read_receipt(json.dumps(message).encode())
        assert receipt.id == message["id"]
        assert reply_difference(message, receipt) is None
    for name in ("id", "receipt", "usage"):
        del whole[name], streamed[name]
    assert whole == streamed


def test_calls_and_their_results(app: Any) -> None:
    fields = {**BODIES["a call"], "max_tokens": 150}
    first = message_of(ask(app, **fields))
    [block] = first["content"]
    assert (first["stop_reason"], block["type"], block["name"]) == ("tool_use", "tool_use", "switch")
    assert block["input"] in ({"on": True}, {"on": False})
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": "done"}]},
    ]
    with_result = message_of(ask(app, tools=[SWITCH], messages=messages, seed=1))
    usage = with_result["usage"]
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert total > first["usage"]["input_tokens"] + first["usage"]["cache_read_input_tokens"]
    assert count_of(ask(app, COUNT, tools=[SWITCH], messages=messages)) == total


def test_thoughts_are_a_block_and_are_handed_back(app: Any) -> None:
    message = message_of(ask(app, **BODIES["thoughts"]))
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert message["content"][0]["thinking"]
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] >= 10
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": message["content"]}]
    more = {"model": "thinks", "messages": [*turns, {"role": "user", "content": "And?"}]}
    without = [*turns[:1], {**turns[1], "content": message["content"][1:]}, *more["messages"][2:]]
    assert count_of(ask(app, COUNT, **more)) > count_of(ask(app, COUNT, **{**more, "messages": without}))


def test_a_stop_sequence_is_told(app: Any) -> None:
    free = message_of(ask(app, seed=7, max_tokens=60, ignore_eos=True))
    [block] = free["content"]
    stop = block["text"][10:14]
    assert (free["stop_reason"], free["stop_sequence"]) == ("max_tokens", None)
    cut = message_of(ask(app, seed=7, max_tokens=60, ignore_eos=True, stop_sequences=["\0\0", stop]))
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)
    assert "".join(b["text"] for b in cut["content"]) == block["text"][: block["text"].index(stop)]


def test_an_answer_has_its_form(app: Any) -> None:
    [block] = message_of(ask(app, **BODIES["a form"]))["content"]
    assert block["text"] in ("1", "2")


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"tools": [{**SWITCH, "strict": True, "input_schema": {"type": "object", "properties": {"a": {"not": {}}}}}]},
        "tools.0.input_schema",
    ),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
        "output_config.format.schema",
    ),
    ({"model": "thinks", "thinking": {"type": "disabled"}}, "thinking"),
    ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs.colour"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_what_the_engine_refuses_is_named_as_in_the_body(app: Any, fields: dict[str, Any], param: str) -> None:
    error = error_of(ask(app, **fields))
    assert error["param"] == param
    assert "function" not in error["message"]
    assert "reasoning_effort" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens, thinking"),
        ({"thinking": {"type": "disabled"}}, "thinking"),
        ({"model": "thinks", "thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking"),
    ],
)
def test_a_model_without_a_switch_answers_and_says_so(app: Any, fields: dict[str, Any], named: str) -> None:
    answer = ask(app, **fields)
    assert answer.status == 200, answer.body
    assert answer.headers["x-ignored-fields"] == named


def test_a_count_is_that_of_the_reply(app: Any) -> None:
    fields: dict[str, Any] = {"system": [{"type": "text", "text": "Be brief."}], "tools": [SWITCH]}
    usage = message_of(ask(app, **fields))["usage"]
    assert count_of(ask(app, COUNT, **fields)) == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_a_prompt_that_comes_again_is_read_from_the_cache(app: Any) -> None:
    fields: dict[str, Any] = {"system": "A long text that is the same. " * 10, "seed": 2}
    first, again = (message_of(ask(app, **fields)) for _ in range(2))
    sums = [m["usage"]["input_tokens"] + m["usage"]["cache_read_input_tokens"] for m in (first, again)]
    assert sums[0] == sums[1]
    assert again["usage"]["cache_read_input_tokens"] > 0
    assert first["content"] == again["content"]


def test_the_same_message_as_a_chat_completion(app: Any) -> None:
    """A thin translation: the same prompt, the same parameters, the same reply."""
    message = message_of(ask(app, system="Be brief.", seed=9, max_tokens=20))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat: Answer = call(app, {"model": "fake", "messages": messages, "seed": 9, "max_tokens": 20})
    [choice] = chat.json["choices"]
    assert "".join(block["text"] for block in message["content"]) == choice["message"]["content"]
    assert message["usage"]["output_tokens"] == chat.json["usage"]["completion_tokens"]


def test_anthropics_client(app: Any) -> None:
    with serving(app) as running:
        client = Anthropic(base_url=f"http://127.0.0.1:{running.port}", api_key="none", max_retries=0)
        asked: dict[str, Any] = {
            "model": "fake",
            "max_tokens": 150,
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": [SWITCH],
            "tool_choice": {"type": "any"},
            "extra_body": {"seed": 3},
        }
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        assert [block.model_dump() for block in streamed.content] == [block.model_dump() for block in whole.content]
        assert (streamed.stop_reason, whole.stop_reason) == ("tool_use", "tool_use")
        assert whole._request_id
        count = client.messages.count_tokens(**{n: asked[n] for n in ("model", "messages", "tools")})
        assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        with pytest.raises(APIStatusError) as refused:
            client.messages.create(**{**asked, "tool_choice": {"type": "tool", "name": "x"}})
        assert refused.value.status_code == 422
        assert refused.value.request_id
        beta = client.beta.messages.create(**asked, betas=["interleaved-thinking-2025-05-14"])
        assert beta.content[0].type == "tool_use"

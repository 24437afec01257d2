"""Replies that go on from a given beginning, at every door, of a real engine: whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import call
from message_shapes import COUNT, ask as ask_message, count_of, error_of, message_of
from test_streaming import joined

from engine import ModelConfig, Registry, read_receipt, reply_difference
from server.app import create_app

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}"
    "\n</think>\n\n{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def app(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    template = tmp_path_factory.mktemp("template") / "thinks.jinja"
    template.write_text(TEMPLATE)
    common: dict[str, Any] = {"path": tiny("qwen3"), "cache_size": "8MiB", "context_length": 512, "threads": 1}
    registry = Registry([ModelConfig(id="fake", chat_template=template, **common)])
    registry.start()
    registry.wait()
    yield create_app(registry)
    registry.close()


def ask(app: Any, messages: list[dict[str, Any]] = ASKED, *, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    answer = call(app, {"model": "fake", "messages": messages, **fields}, path=path)
    assert answer.status == 200, answer.body
    return answer.json


HOW: dict[str, Any] = {
    "seed": 9, "ignore_eos": True, "return_token_ids": True, "logprobs": True, "frequency_penalty": 0.6,
    "presence_penalty": 0.2,
}  # fmt: skip


def test_a_click_on_any_token_goes_on_from_there(app: Any) -> None:
    """Same again from token k on, whole and streamed, with a receipt that is its own."""
    [whole] = ask(app, **HOW, max_tokens=24)["choices"]
    ids, entries = whole["token_ids"], whole["logprobs"]["content"]
    for k in (1, 7, 23):
        fields = {**HOW, "max_tokens": 24 - k, "continue_token_ids": ids[:k], "receipt": True}
        body = ask(app, **fields)
        [rest] = body["choices"]
        assert rest["token_ids"] == ids[k:]
        assert rest["logprobs"]["content"] == entries[k:]
        assert whole["message"]["content"].endswith(rest["message"]["content"])
        assert body["usage"]["completion_tokens"] == 24 - k
        receipt = read_receipt(json.dumps(body).encode())
        assert reply_difference(body, receipt) is None
        assert receipt.request["continue_token_ids"] == ids[:k]
        streamed = call(app, {"model": "fake", "messages": ASKED, **fields, "stream": True})
        [choice] = joined(streamed.events[:-1], 1)
        assert choice["content"] == rest["message"]["content"]
        assert choice["logprobs"]["content"] == rest["logprobs"]["content"]


def test_a_text_goes_on_behind_its_last_character(app: Any) -> None:
    """`content` holds what is new; the prompt is the one that `/tokenize` shows, and it ends with the text."""
    turns = [*ASKED, {"role": "assistant", "content": "Yes, of cou"}]
    body = ask(app, turns, continue_final_message=True, **HOW, max_tokens=8)
    assert not body["choices"][0]["message"]["content"].startswith("Yes")
    tokens = {
        name: ask(app, turns, path="/tokenize", **fields)["tokens"]
        for name, fields in {
            "on": {"continue_final_message": True},
            "as vLLM's clients": {"continue_final_message": True, "add_generation_prompt": False},
            "a turn that has ended": {"add_generation_prompt": False},
        }.items()
    }
    assert tokens["on"] == tokens["as vLLM's clients"]
    assert body["usage"]["prompt_tokens"] == len(tokens["on"])
    text = ask_text(app, tokens["on"])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes, of cou"
    assert ask_text(app, tokens["a turn that has ended"]) == f"{text}<|im_end|>\n"


def ask_text(app: Any, tokens: list[int]) -> str:
    text: str = call(app, {"model": "fake", "tokens": tokens}, path="/detokenize").json["prompt"]
    return text


def test_thoughts_go_on_as_thoughts(app: Any) -> None:
    turns = [*ASKED, {"role": "assistant", "content": None, "reasoning_content": "Let me th"}]
    [choice] = ask(app, turns, continue_final_message=True, **HOW, max_tokens=8)["choices"]
    assert choice["message"]["reasoning_content"]
    assert not choice["message"]["content"]
    [cut] = ask(app, turns, continue_final_message=True, **HOW, max_tokens=30, thinking_budget=10)["choices"]
    assert cut["message"]["content"], "the thoughts so far count"


def test_a_message_goes_on_as_a_chat_does(app: Any) -> None:
    turns = [*ASKED, {"role": "assistant", "content": "Yes, of cou"}]
    how = {"seed": 9, "ignore_eos": True, "max_tokens": 8}
    [choice] = ask(app, turns, continue_final_message=True, **how)["choices"]
    for stream in (False, True):
        message = message_of(ask_message(app, messages=turns, stream=stream, **how))
        assert "".join(block["text"] for block in message["content"]) == choice["message"]["content"]
    usage = message["usage"]
    assert count_of(ask_message(app, COUNT, messages=turns)) == usage["input_tokens"] + usage["cache_read_input_tokens"]
    thought = [*ASKED, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": ""}]}]
    assert message_of(ask_message(app, messages=thought, **how))["content"][0]["type"] == "thinking"
    refused = error_of(ask_message(app, messages=turns[1:]))
    assert refused["param"] == "messages"


BEGUN = [*ASKED, {"role": "assistant", "content": "Yes"}]
CALLED = {
    "role": "assistant",
    "content": "Yes",
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 2]}, "strict": True}}
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": ASKED, "continue_final_message": True}, 422, "messages.0.role"),
    ({"messages": BEGUN, "continue_final_message": 1}, 400, "continue_final_message"),
    ({"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True}, 422, "add_generation_prompt"),
    ({"messages": BEGUN, "continue_final_message": True, "continue_token_ids": [5]}, 422, "continue_token_ids"),
    ({"messages": [*ASKED, CALLED], "continue_final_message": True}, 422, "messages.1.tool_calls"),
    ({"messages": BEGUN, "continue_final_message": True, "response_format": FORM}, 422, "continue_final_message"),
    ({"messages": ASKED, "continue_token_ids": "5"}, 400, "continue_token_ids"),
    ({"messages": ASKED, "continue_token_ids": [5, True]}, 400, "continue_token_ids.1"),
    ({"messages": ASKED, "continue_token_ids": [5, -1]}, 422, "continue_token_ids.1"),
    ({"messages": ASKED, "continue_token_ids": [5, 99_999]}, 422, "continue_token_ids.1"),
    ({"messages": ASKED, "continue_token_ids": [2]}, 422, "continue_token_ids"),
    ({"messages": ASKED, "continue_token_ids": [5] * 600}, 400, "messages"),
]


@pytest.mark.parametrize(("fields", "status", "param"), REFUSED, ids=lambda v: json.dumps(v)[-60:])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_go_on_is_refused_before_the_first_byte(
    app: Any, fields: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    answer = call(app, {"model": "fake", "max_tokens": 4, **fields, "stream": stream})
    assert (answer.status, answer.error["param"]) == (status, param), answer.body


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("field", [{"continue_final_message": True}, {"continue_token_ids": [5]}])
def test_doors_without_the_fields_refuse_them(app: Any, path: str, field: dict[str, Any]) -> None:
    body = {"/v1/completions": {"prompt": "a"}, "/v1/responses": {"input": "a"}}.get(path, {"messages": ASKED})
    answer = call(app, {"model": "fake", **body, **field}, path=path)
    assert (answer.status, answer.error["param"]) == (422, next(iter(field)))

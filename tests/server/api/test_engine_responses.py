"""`POST /responses` on a real engine: the same replies as chat completions, and what the SDK does with them."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import CHAT, Answer, begin
from openai import BadRequestError, OpenAI, UnprocessableEntityError
from pydantic import BaseModel
from response_events import collected, read
from wire_client import serving

from engine import ModelConfig, Registry, documents_of, read_document, reply_difference
from server.app import create_app

PATH = "/v1/responses"
THINKS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
SWITCH: dict[str, Any] = {
    "type": "function",
    "name": "switch",
    "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


class Mood(BaseModel):
    good: bool


@pytest.fixture(scope="module")
def app(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    template = tmp_path_factory.mktemp("template") / "thinks.jinja"
    template.write_text(THINKS)
    common: dict[str, Any] = {"path": tiny("qwen3"), "cache_size": "8MiB", "context_length": 1024, "threads": 1}
    registry = Registry([ModelConfig(id="thinks", chat_template=template, **common), ModelConfig(id="plain", **common)])
    registry.start()
    registry.wait()
    yield create_app(registry)
    registry.close()


@pytest.fixture
def client(app: Any) -> Iterator[OpenAI]:
    with serving(app) as running:
        yield OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0)


def ask(app: Any, path: str = PATH, **fields: Any) -> Answer:
    async def main() -> Answer:
        given = {"input": "Hi"} if path == PATH else {"messages": [{"role": "user", "content": "Hi"}]}
        return await begin(app, {"model": "plain", "seed": 4, **given, **fields}, path=path).ended(30)

    answer = asyncio.run(main())
    assert answer.status == 200, answer.body
    return answer


THOUGHT: dict[str, Any] = {"model": "thinks", "thinking_budget": 6, "ignore_eos": True, "max_output_tokens": 30}
REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"max_output_tokens": 8},
    "thoughts": THOUGHT,
    "thoughts and no answer": {**THOUGHT, "max_output_tokens": 5},
    "log-probabilities": {**THOUGHT, "top_logprobs": 1, "return_token_ids": True, "margins": True},
    "the prompt's": {"prompt_logprobs": 1, "max_output_tokens": 3},
    "a call": {"tools": [SWITCH], "tool_choice": "required", "parallel_tool_calls": False},
    "calls": {"tools": [SWITCH], "tool_choice": "required", "max_output_tokens": 60},
    "a call of a namespace": {
        "tools": [{"type": "namespace", "name": "lamp", "tools": [SWITCH]}],
        "tool_choice": {"type": "function", "namespace": "lamp", "name": "switch"},
        "parallel_tool_calls": False,
    },
    "a form": {"text": {"format": {"type": "json_schema", "name": "m", "schema": Mood.model_json_schema()}}},
    "nothing": {"max_output_tokens": 0},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_is_the_whole_answer(app: Any, name: str) -> None:
    whole = ask(app, **REQUESTS[name]).json
    streamed = collected(read(ask(app, stream=True, **REQUESTS[name]).body))

    def bare(response: dict[str, Any]) -> Any:
        found = json.loads(json.dumps(response).replace(response["id"].removeprefix("resp_"), "ID"))
        found["usage"]["input_tokens_details"].pop("cached_tokens")  # the second one finds the first one's prompt
        return {**found, "created_at": 0}

    assert bare(streamed) == bare(whole)


def test_a_response_is_the_reply_of_a_chat(app: Any) -> None:
    """A translation and nothing else: the tokens are those of the chat that the items say."""
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Yes?"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Go on."}]},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?", "reasoning_content": "hm"},
        {"role": "user", "content": "Go on."},
    ]
    fields = {"model": "thinks", "thinking_budget": 6, "return_token_ids": True}
    response = ask(app, input=items, instructions="Be brief.", max_output_tokens=20, **fields).json
    chat = ask(app, CHAT, messages=messages, max_completion_tokens=20, **fields).json
    [choice] = chat["choices"]
    assert response["token_ids"] == choice["token_ids"]
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    texts = {item["type"]: item["content"][0]["text"] for item in response["output"]}
    assert texts["reasoning"] == choice["message"]["reasoning_content"]
    assert texts.get("message", "") == choice["message"]["content"]


def test_a_conversation_by_items_goes_on(client: OpenAI) -> None:
    """What agents do: call, answer the call with the items as they came, thoughts included, and ask again."""
    history: list[Any] = [{"role": "user", "content": "Light, please."}]
    first = client.responses.create(
        model="thinks", input=history, tools=[SWITCH], tool_choice="required", parallel_tool_calls=False,  # type: ignore[list-item]
        include=["reasoning.encrypted_content"], extra_body={"thinking_budget": 5, "seed": 3}, store=False,
    )  # fmt: skip
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    call = first.output[-1]
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"on"}
    answered = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    again = [*history, *(item.model_dump(exclude_none=True) for item in first.output), answered]
    packed = [{k: v for k, v in item.items() if k != "content"} if "summary" in item else item for item in again]
    replies = [
        client.responses.create(
            model="thinks", input=items, tools=[SWITCH], max_output_tokens=12, extra_body={"seed": 3},  # type: ignore[list-item]
        )
        for items in (again, packed)
    ]  # fmt: skip
    assert replies[0].status in ("completed", "incomplete")
    assert replies[0].usage is not None
    assert replies[1].usage is not None
    assert replies[0].usage.input_tokens == replies[1].usage.input_tokens > first.usage.input_tokens  # type: ignore[union-attr]
    without = client.responses.create(
        model="thinks",
        input=[item for item in again if "summary" not in item],
        max_output_tokens=1,  # type: ignore[misc]
    )
    assert without.usage is not None
    assert without.usage.input_tokens != replies[0].usage.input_tokens  # the thoughts are in the prompt


def test_parsed_answers_and_parsed_streams(client: OpenAI) -> None:
    parsed = client.responses.parse(model="plain", input="How?", text_format=Mood, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Mood)
    with client.responses.stream(model="plain", input="How?", text_format=Mood, extra_body={"seed": 1}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_parsed == parsed.output_parsed
    assert final.output_text == parsed.output_text


def test_errors_reach_the_client_by_the_name_of_the_field(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as found:
        client.responses.create(model="plain", input="a " * 3000)
    assert found.value.code == "context_length_exceeded"
    assert found.value.param == "input"
    wrong = {**SWITCH, "strict": True, "parameters": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}}
    namespace: Any = {"type": "namespace", "name": "lamp", "tools": [SWITCH, {**wrong, "name": "other"}]}
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": {"$ref": "#/nowhere"}, "strict": True}}
    for fields, param in (
        ({"tools": [wrong]}, "tools.0.parameters"),
        ({"tools": [namespace]}, "tools.0.tools.1.parameters"),
        ({"text": form}, "text.format.schema"),
        ({"extra_body": {"reasoning": {"effort": "enormous"}}}, "reasoning.effort"),
        ({"max_output_tokens": -3}, "max_output_tokens"),
    ):
        with pytest.raises((UnprocessableEntityError, BadRequestError)) as refused:
            client.responses.create(model="plain", input="Hi", **fields)  # type: ignore[call-overload]
        assert refused.value.param == param, refused.value.body
        assert param in refused.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_receipt_comes_with_the_response_and_is_compared_with_it(app: Any, stream: bool) -> None:
    fields = {"max_output_tokens": 5, "receipt": True, "return_token_ids": True, "stream": stream}
    answer = ask(app, **fields)
    events = read(answer.body) if stream else []
    response = events[-1]["response"] if stream else answer.json
    for text in (json.dumps(response), json.dumps(events[-1]) if stream else answer.body.decode()):
        [document], reply = documents_of(text.encode())
        assert reply is not None
        assert reply_difference(reply, read_document(document)) is None
    receipt = read_document(response["receipt"])
    for change in ({"id": "resp_0"}, {"status": "completed"}, {"token_ids": [1]}):
        assert reply_difference({**copy.deepcopy(response), **change}, receipt)

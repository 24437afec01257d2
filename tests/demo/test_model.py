"""The demo model as a user meets it: `verbatim serve` with the repository's models.yaml, answers that make sense."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "server"))
from live_server import start  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("demo")
    with start(["--config", str(ROOT / "models.yaml")], folder) as server:
        yield server.client()


def say(client: OpenAI, *turns: str, system: str = "", **fields: Any) -> str:
    """The last answer of a conversation whose earlier answers are the model's own."""
    messages: Any = [{"role": "system", "content": system}] if system else []
    answer = ""
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        reply = client.chat.completions.create(model="demo", messages=messages, **{"temperature": 0, **fields})
        answer = reply.choices[0].message.content or ""
        assert reply.choices[0].finish_reason == "stop"
        messages.append({"role": "assistant", "content": answer})
    return answer


def test_it_says_who_it_is(client: OpenAI) -> None:
    assert "demo model bundled with verbatim" in say(client, "Who are you?")


def test_a_sum(client: OpenAI) -> None:
    assert say(client, "What is 47 + 38?") == "47 + 38 = 85."
    assert "59" in say(client, "What is 23 + 36?", reasoning_effort="high")


def test_a_sum_with_worked_steps(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is 47 + 38?"}]
    reply = client.chat.completions.create(model="demo", messages=messages, temperature=0, reasoning_effort="high")
    assert "carry 1" in reply.choices[0].message.reasoning_content  # type: ignore[attr-defined]
    assert "85" in (reply.choices[0].message.content or "")


def test_a_name_is_remembered_over_three_turns(client: OpenAI) -> None:
    assert "Clara" in say(client, "My name is Clara.", "What is a seed?", "What is my name?")


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_a_tool_is_called_and_its_result_is_told(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    fields: Any = {"model": "demo", "tools": [WEATHER], "temperature": 0}
    reply = client.chat.completions.create(messages=messages, **fields).choices[0]
    [call] = reply.message.tool_calls or []
    assert reply.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    messages += [reply.message, {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 17}'}]
    answer = client.chat.completions.create(messages=messages, **fields).choices[0]
    assert "17" in (answer.message.content or "")


def test_a_streamed_call_is_the_same_call(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    fields: Any = {"model": "demo", "messages": messages, "tools": [WEATHER], "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**fields).choices[0].message.tool_calls
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert [(c.id, c.function.name, c.function.arguments) for c in streamed or []] == [
        (c.id, c.function.name, c.function.arguments)  # type: ignore[union-attr]
        for c in whole or []
    ]
    assert whole


def test_a_story_differs_by_seed_and_repeats_with_it(client: OpenAI) -> None:
    stories = [say(client, "Tell me a story.", temperature=1, seed=seed) for seed in (1, 2, 3, 1, 2, 3)]
    assert stories[:3] == stories[3:]
    assert len(set(stories)) == 3
    assert all(len(story.split()) > 30 for story in stories)


def test_a_system_prompt_is_followed(client: OpenAI) -> None:
    answer = say(client, "Hello", system="Always answer in upper case.")
    assert answer == answer.upper()
    assert "HELLO" in answer


def test_json_has_the_fields_that_were_asked_for(client: OpenAI) -> None:
    answer = say(client, "Give me a JSON object with name Clara, age 31 and city Paris.")
    assert json.loads(answer) == {"name": "Clara", "age": 31, "city": "Paris"}


class Person(BaseModel):
    name: str
    city: str


def test_a_pydantic_model_comes_back(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Write JSON with name Clara and city Paris."}]
    reply = client.chat.completions.parse(model="demo", messages=messages, temperature=0, response_format=Person)
    assert reply.choices[0].message.parsed == Person(name="Clara", city="Paris")


def test_the_folder_is_small_and_complete() -> None:
    files = list((ROOT / "demo" / "model").iterdir())
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}

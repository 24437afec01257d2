"""The demo model as a user meets it: `verbatim serve` with the repository's models.yaml, answers that make sense."""

from __future__ import annotations

import json
import re
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
    assert "59" in say(client, "What is 23 + 36?")


def test_a_sum_with_worked_steps(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is 47 + 38?"}]
    reply = client.chat.completions.create(model="demo", messages=messages, temperature=0, reasoning_effort="high")
    assert "carry 1" in reply.choices[0].message.reasoning_content  # type: ignore[attr-defined]
    assert "85" in (reply.choices[0].message.content or "")


def test_a_name_is_remembered_over_three_turns(client: OpenAI) -> None:
    assert "Clara" in say(client, "My name is Clara.", "What is a seed?", "What is my name?")


def test_a_tool_is_called_with_its_arguments(client: OpenAI) -> None:
    weather = {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    # What the chat template writes for `tools`, which the API does not take yet.
    answer = say(client, "What is the weather in Oslo?", system=f"# Tools\n{json.dumps(weather)}")
    [call] = re.findall(r"<tool_call>\n(.*)\n</tool_call>", answer)
    assert json.loads(call) == {"name": "get_weather", "arguments": {"city": "Oslo"}}


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

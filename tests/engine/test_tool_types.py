"""Tools and how they are chosen: what chat templates get, and what is refused when it is constructed."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from engine import (
    LLM,
    ChatMessage,
    InvalidParameter,
    ReplyFormat,
    RequestError,
    Tool,
    ToolChoice,
    ensure_noise_checkpoint,
)
from engine.templates.chat_template import definition_of

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"b": {}, "a": {}}}


@pytest.mark.parametrize(
    ("tool", "function"),
    [
        (Tool("f"), '{"name": "f"}'),
        (Tool("f", ""), '{"name": "f", "description": ""}'),
        (Tool("f", parameters={}), '{"name": "f", "parameters": {}}'),
        (Tool("f", "d", SCHEMA, True), f'{{"name": "f", "description": "d", "parameters": {json.dumps(SCHEMA)}}}'),
    ],
)
def test_templates_get_the_fields_that_were_given(tool: Tool, function: str) -> None:
    """Prompts depend on it to the byte: the order of the keys, and that what was not given is missing, not null."""
    assert json.dumps(definition_of(tool)) == f'{{"type": "function", "function": {function}}}'


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("none", None, "must be auto, required or function, not 'none'"),
        (":f", None, "not ':f'"),
        ("function", None, "function takes the name of a function"),
        ("required", "f", "required takes no name"),
    ],
)
def test_a_choice_that_says_nothing_clear_is_refused(kind: Any, name: str | None, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words) as raised:
        ToolChoice(kind, name)
    assert raised.value.param == "tool_choice"


def test_a_reply_format_crosses_processes_whole() -> None:
    whole = ReplyFormat(
        chat=True, tools=(Tool("f", "d", SCHEMA), Tool("g")), unenforced_schema=SCHEMA, unenforced_tools=frozenset("f")
    )
    assert pickle.loads(pickle.dumps(whole)) == whole
    assert whole.tool("g") == Tool("g")
    assert whole.tool("h") is None


@pytest.fixture(scope="module")
def noise() -> LLM:
    return LLM(ensure_noise_checkpoint(), cache_size="8MiB", context_length=256)


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0 must be a Tool, not dict", "tools.0"),
        ({"tools": [Tool("f")], "tool_choice": "required"}, "must be a ToolChoice, not str", "tool_choice"),
        ({"tools": [Tool("f")], "tool_choice": ToolChoice("function", "g")}, "there is no tool 'g'", "tool_choice"),
        ({"tool_choice": ToolChoice("function", "g")}, "there is no tool 'g'", "tool_choice"),
    ],
)
def test_a_script_hears_what_is_wrong_with_its_tools(
    noise: LLM, fields: dict[str, Any], words: str, param: str
) -> None:
    with pytest.raises(RequestError, match=words) as raised:
        noise.generate([ChatMessage("user", "Hello")], **fields)
    assert raised.value.param == param

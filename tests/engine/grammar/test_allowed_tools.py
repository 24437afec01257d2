"""A list of allowed tools: the prompt shows all tools, and the grammar lets the model call no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tool_grammar import HELLO, STRICT, accepts, grammar_of, walk
from tool_forms import FORMATS, read, written

from engine import LLM, Constraint, GenerationRequest, InvalidParameter, Tool, ToolChoice

PING = ToolChoice("required", allowed=("ping",))


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=1024)


def prepared(llm: LLM, **fields: Any) -> Any:
    request = GenerationRequest(request_id="r", messages=tuple(HELLO), tools=tuple(STRICT), **fields)
    return llm.engine.prepare(request)


@pytest.mark.parametrize("kind", ["auto", "required"])
def test_the_prompt_is_that_of_all_tools(llm: LLM, kind: Any) -> None:
    """So the prefix cache serves every list."""
    all_tools = prepared(llm)
    some = prepared(llm, tool_choice=ToolChoice(kind, allowed=("ping",)))
    assert some.prompt_token_ids == all_tools.prompt_token_ids
    assert some.grammar is not None


@pytest.mark.parametrize("name", FORMATS)
def test_no_other_tool_is_called(llm: LLM, name: str) -> None:
    found = FORMATS[name]
    grammar = grammar_of(llm, found, STRICT, several=found.between is not None, allows=PING.allows).text
    assert accepts(llm, grammar, written(found, [("ping", {})]))
    assert not accepts(llm, grammar, written(found, [("get_weather", {"city": "Oslo", "days": 3})]))
    for seed in range(4):
        text = walk(llm, grammar, random.Random(seed))
        assert text is not None
        assert {called for called, _ in read(found, [text], STRICT)[1]} == {"ping"}


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "bare"])
def test_where_the_model_decides_it_decides_between_the_allowed_and_text(llm: LLM, name: str) -> None:
    found = FORMATS[name]
    grammar = grammar_of(llm, found, STRICT, free=True, several=True, allows=PING.allows).text
    for text, accepted in (
        ("Just text.", True),
        (f"So: {written(found, [('ping', {})])}", True),
        (f"So: {written(found, [('get_weather', {'city': 'Oslo', 'days': 3})])}", False),
    ):
        assert accepts(llm, grammar, text) == accepted, text


@pytest.mark.parametrize("name", ["bare", "hermes"])
def test_beside_a_form(llm: LLM, name: str) -> None:
    """In a format without tags calls and the answer are one JSON schema."""
    form = Constraint("json", {"enum": [1, 2]})
    grammar = grammar_of(llm, FORMATS[name], STRICT, otherwise=form, allows=PING.allows).text
    for text, accepted in (
        ("2", True),
        (written(FORMATS[name], [("ping", {})]), True),
        (written(FORMATS[name], [("get_weather", {"city": "Oslo", "days": 3})]), False),
    ):
        assert accepts(llm, grammar, text) == accepted, text


def test_replies_of_a_model(llm: LLM) -> None:
    for seed in range(3):
        [answer] = llm.generate(HELLO, tools=STRICT, tool_choice=PING, seed=seed, max_tokens=200)
        assert {call.name for call in answer.tool_calls} == {"ping"}


def test_names_with_dots_and_slashes_are_enforced_and_read(llm: LLM) -> None:
    tools = [Tool(name, parameters={"type": "object", "properties": {}, "additionalProperties": False}) for name in
             ("fs", "fs.read", "fs.read/all", "a" * 128)]  # fmt: skip
    for name, found in FORMATS.items():
        grammar = grammar_of(llm, found, tools).text
        for tool in tools:
            text = written(found, [(tool.name, {})])
            assert accepts(llm, grammar, text), (name, tool.name)
            assert read(found, list(text), tools, exact_calls=True) == ("", [(tool.name, {})])


def test_what_says_nothing_clear_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidParameter, match="takes no list of allowed tools"):
        ToolChoice("function", "ping", ("ping",))
    with pytest.raises(InvalidParameter, match="there is no tool 'pong'"):
        prepared(llm, tool_choice=ToolChoice(allowed=("ping", "pong")))

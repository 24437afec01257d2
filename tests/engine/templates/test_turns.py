"""Turns without content, and calls whose arguments are no object: what every template that people run makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import ChatMessage, Tool, ToolCall
from engine.replies.chat_format import find_chat_format
from engine.templates.chat_template import ChatTemplate
from engine.templates.turns import AS_TEXT

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = ChatMessage("user", "Hello")
PING = Tool("ping", "-", {"type": "object", "properties": {"a": {"type": "string", "description": "-"}}})
FAMILIES = (
    "GLM-4.6", "SmolLM3", "Hermes", "Qwen2.5", "Qwen3-0.6B", "Qwen3-Coder", "DeepSeek-R1", "DeepSeek-V3.1", "gemma",
    "granite", "meta-llama", "Phi-3.5", "Mistral", "gpt-oss",
)  # fmt: skip


def template_of(shared: Path, family: str) -> ChatTemplate:
    [file] = (shared / "chat_templates").glob(f"*{family}*")
    return ChatTemplate(file.read_text(encoding="utf-8"), SPECIAL)


def call(arguments: str) -> tuple[ToolCall, ...]:
    return (ToolCall("abcdef001", "ping", arguments),)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_content_is_an_empty_text(shared: Path, family: str) -> None:
    """Many templates would write it as the word None, or fail."""
    template = template_of(shared, family)

    def rendered(content: str | None) -> list[str]:
        turns = [[HELLO, ChatMessage("assistant", content), HELLO]]
        if find_chat_format(template).shows_tools:
            called = ChatMessage("assistant", content, tool_calls=call("{}"))
            turns.append([HELLO, called, ChatMessage("tool", content, tool_call_id="abcdef001")])
        return [template.render(turn, tools=[PING] if len(turns) > 1 else []) for turn in turns]

    assert rendered(None) == rendered("")
    assert not any("None" in text for text in rendered(None))


ODD = ['{"a": "half', "not JSON", "[]", "3", "null", '"text"', '{"a": "\\ud800"}', '{"a":' * 300 + "1" + "}" * 300]


@pytest.mark.parametrize("arguments", ODD, ids=lambda text: text[:20])
@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_that_are_no_object_are_what_the_model_sees(shared: Path, family: str, arguments: str) -> None:
    """A conversation in which a model once wrote such arguments must go on with every template."""
    template = template_of(shared, family)
    if not find_chat_format(template).shows_tools or family == "granite":
        return  # calls are written into the text, as they are
    text = template.render([HELLO, ChatMessage("assistant", "", tool_calls=call(arguments))], tools=[PING])
    assert arguments in text or json.dumps(arguments)[1:-1] in text
    assert "None" not in text
    text.encode()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_object_is_handed_over_as_one(shared: Path, family: str) -> None:
    template = template_of(shared, family)
    if not find_chat_format(template).shows_tools or family == "granite":
        return
    text = template.render([HELLO, ChatMessage("assistant", "", tool_calls=call('{"a": "Wert"}'))], tools=[PING])
    assert "Wert" in text
    assert '\\"' not in text


def test_a_template_that_goes_through_arguments_gets_the_text_as_one_of_them() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"
    )
    turns = [HELLO, ChatMessage("assistant", None, tool_calls=call("Paris"))]
    assert ChatTemplate(source).render(turns) == f"{AS_TEXT}=Paris;"


def test_a_template_that_takes_text_gets_it_as_it_is() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    for arguments in ("Paris", '{"a": 1}', "[1"):
        turns = [HELLO, ChatMessage("assistant", None, tool_calls=call(arguments))]
        assert ChatTemplate(source).render(turns) == arguments

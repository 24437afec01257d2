"""What a system turn says reaches the model wherever it stands, whatever the template does with such turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers_for_tests
from hypothesis import given, strategies as st

from engine.errors import TemplateRefused
from engine.prompts.chat_prompt import ChatPrompts, control_words
from engine.prompts.content_guard import ControlWords
from engine.prompts.prompt_encoder import PromptEncoder
from engine.prompts.system_turns import lost_roles, with_late_turns_as_users
from engine.replies.chat_format import find_chat_format
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage, ToolCall
from engine.types.requests import GenerationRequest

ALL = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
FIRST = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}<assistant>"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('only one') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
USER, ANSWER = ChatMessage("user", "Hi"), ChatMessage("assistant", "Yes.")
SYSTEM, LATE = ChatMessage("system", "Be brief."), ChatMessage("system", "It rains.")
BOTH = frozenset({"system", "developer"})


def rendered(source: str, *messages: ChatMessage) -> str:
    template = ChatTemplate(source)
    tokenizer = tokenizers_for_tests.llama_like()
    chat_format = find_chat_format(template)
    words, kept = control_words(tokenizer, template, chat_format)
    prompts = ChatPrompts(template, chat_format, PromptEncoder(tokenizer, words), ControlWords(words, kept))
    return prompts.render(prompts.conversation(GenerationRequest(request_id="a", messages=messages), {}))


@pytest.mark.parametrize(
    ("source", "lost"), [(ALL, frozenset()), (FIRST, BOTH), (STRICT, BOTH), (ALTERNATING, BOTH), (None, frozenset())]
)
def test_what_a_template_loses_is_found(source: str | None, lost: frozenset[str]) -> None:
    assert lost_roles(ChatTemplate(source), tools=False) == lost


@pytest.mark.parametrize("source", [FIRST, STRICT])
def test_a_late_system_turn_becomes_a_part_of_the_users(source: str) -> None:
    assert rendered(source, SYSTEM, USER, LATE) == "<system>Be brief.<user>Hi\nIt rains.<assistant>"
    assert rendered(source, SYSTEM, USER, ANSWER, LATE, USER) == (
        "<system>Be brief.<user>Hi<assistant>Yes.<user>It rains.\nHi<assistant>"
    )


def test_a_template_that_shows_it_gets_it_as_it_is() -> None:
    assert rendered(ALL, USER, LATE) == "<user>Hi<system>It rains.<assistant>"


def test_turns_in_alternation_stay_so() -> None:
    assert rendered(ALTERNATING, USER, LATE, ANSWER, USER) == "<user>Hi\nIt rains.<assistant>Yes.<user>Hi<assistant>"
    with pytest.raises(TemplateRefused):
        rendered(ALTERNATING, SYSTEM, USER)


@given(st.lists(st.sampled_from(["system", "developer", "user", "assistant", "tool"]), max_size=8))
def test_nothing_is_lost_and_nothing_else_is_changed(roles: list[str]) -> None:
    call = (ToolCall("a", "ping", "{}"),)
    messages = [
        ChatMessage(r, f"<{i}>", tool_calls=call if r == "assistant" else (), tool_call_id="a" if r == "tool" else None)
        for i, r in enumerate(roles)
    ]
    moved = with_late_turns_as_users(messages, BOTH)
    assert "".join((m.content or "").replace("\n", "") for m in moved) == "".join(m.content or "" for m in messages)
    first = next((i for i, role in enumerate(roles) if role not in BOTH), len(roles))
    assert moved[:first] == messages[:first]
    assert not BOTH & {message.role for message in moved[first:]}
    assert [m for m in moved if m.role in ("assistant", "tool")] == [
        m for m in messages if m.role in ("assistant", "tool")
    ]
    if not BOTH & set(roles[first:]):
        assert moved == messages


@pytest.mark.parametrize("family", ["SmolLM3", "gpt-oss", "Mistral", "Qwen3-0.6B", "meta-llama"])
def test_families_that_people_run(shared: Path, family: str) -> None:
    [file] = (shared / "chat_templates").glob(f"*{family}*")
    source = file.read_text(encoding="utf-8")
    assert bool(lost_roles(ChatTemplate(source), tools=False)) == (family in ("SmolLM3", "gpt-oss", "Mistral"))
    assert "It rains." in rendered(source, SYSTEM, USER, LATE)

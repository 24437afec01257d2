"""System turns after the beginning of a conversation, for templates that refuse them or leave them out.

Some refuse a system turn that is not the first (Mistral), and some drop it without a word (gpt-oss, SmolLM3): the
model would never see what it was told. There such a turn becomes part of a user's. Pure: messages in, messages out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from engine.errors import TemplateRefused
from engine.templates.chat_template import ChatTemplate
from engine.types.messages import ChatMessage
from engine.types.tools import Tool

__all__ = ["lost_roles", "with_late_turns_as_users"]

_ROLES: Final = ("system", "developer")
_TOLD: Final = "Zwischenruf"  # no template writes this word
_TOOL: Final = Tool("frage", "Frage", {"type": "object", "properties": {}})


def lost_roles(template: ChatTemplate, *, tools: bool) -> frozenset[str]:
    """Return the roles whose turns this template does not show after a user's; none if it refuses even that one.

    A turn is tried at the end and before the assistant's answer, where a demand for alternation would refuse it.
    """
    user, answer = ChatMessage("user", "Frage"), ChatMessage("assistant", "Antwort")
    offered = [_TOOL] if tools else []
    try:
        template.render([user], tools=offered)
    except TemplateRefused:
        return frozenset()
    found = set()
    for role in _ROLES:
        last = [user, ChatMessage(role, _TOLD)]
        if not all(_shows(template, messages, offered) for messages in (last, [*last, answer, user])):
            found.add(role)
    return frozenset(found)


def _shows(template: ChatTemplate, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> bool:
    try:
        return _TOLD in template.render(messages, tools=tools)
    except TemplateRefused:
        return False


def with_late_turns_as_users(messages: Sequence[ChatMessage], roles: Collection[str]) -> list[ChatMessage]:
    """Return messages in which turns of these roles, those at the beginning aside, are a user's.

    They are combined with a user's turn beside them: templates that allow one system turn often demand turns in
    alternation.
    """
    turns: list[list[ChatMessage]] = []  # each one turn, joined at the end: once, however many there are
    began = moved = False
    for message in messages:
        late = began and message.role in roles
        began = began or message.role not in _ROLES
        turn = replace(message, role="user") if late else message
        if turns and turn.role == turns[-1][0].role == "user" and (late or moved):
            turns[-1].append(turn)
        else:
            turns.append([turn])
            moved = False
        moved = moved or late
    return [_combined(parts) for parts in turns]


def _combined(parts: Sequence[ChatMessage]) -> ChatMessage:
    if len(parts) == 1:
        return parts[0]
    return replace(parts[0], content="\n".join(part.content for part in parts if part.content))

"""Rewrites messages with tool calls and results, for chat templates that render them in part or not at all.

Pure: messages in, messages out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from engine.replies.tool_format import CALL_ID, GENERIC, ToolFormat
from engine.templates.chat_template import definition_of
from engine.types.messages import ChatMessage, ToolCall
from engine.types.tools import Tool

__all__ = ["generic_messages", "one_call_a_turn", "with_written_calls"]


def _write_calls(tool_format: ToolFormat, calls: Sequence[ToolCall]) -> str:
    """Write calls as the model does; `json` formats only."""
    form = tool_format
    texts = [f"{form.open}{c.name}{form.middle}{c.arguments}{form.close.replace(CALL_ID, c.id)}" for c in calls]
    return form.begin + (form.between or "\n").join(texts) + form.end


def with_written_calls(messages: Sequence[ChatMessage], tool_format: ToolFormat) -> list[ChatMessage]:
    """Write earlier calls into the text, for a template that shows tools and results but no calls."""
    return [
        replace(m, content=f"{m.content or ''}\n{_write_calls(tool_format, m.tool_calls)}".lstrip("\n"), tool_calls=())
        if m.tool_calls
        else m
        for m in messages
    ]


def one_call_a_turn(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Split each turn with several calls into one turn per call, each followed by its result.

    For templates that accept one call a turn.
    """
    turns: list[ChatMessage] = []
    left = list(messages)
    while left:
        turn = left.pop(0)
        if len(turn.tool_calls) < 2:
            turns.append(turn)
            continue
        results: list[ChatMessage] = []
        while left and left[0].role == "tool":
            results.append(left.pop(0))
        for i, call in enumerate(turn.tool_calls):
            said = turn if i == 0 else replace(turn, content="", reasoning_content=None)
            turns.append(replace(said, tool_calls=(call,)))
            own = next((result for result in results if result.tool_call_id == call.id), None)
            if own is not None:
                turns.append(own)
                results.remove(own)
        turns += results
    return turns


def generic_messages(messages: Sequence[ChatMessage], tools: Sequence[Tool], *, system: bool) -> list[ChatMessage]:
    """Rewrite a conversation with tools as one without, for a template that does not support tools.

    Definitions go into a system turn (without `system`: into the first turn), calls into the assistant's text, and
    results into a user's turn.
    """
    lines = [json.dumps(definition_of(tool)["function"], ensure_ascii=False) for tool in tools]
    block = "\n".join(
        [
            "# Tools",
            "These functions can be called:",
            *lines,
            "To call one, write only this, with its name and its arguments:",
            f"{GENERIC.open}NAME{GENERIC.middle}{{}}{GENERIC.close}",
        ]
    )
    turns: list[ChatMessage] = []
    for message in messages:
        content = message.content or ""
        if message.role == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            if turns and turns[-1].role == "user" and (turns[-1].content or "").endswith("</tool_response>"):
                turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{result}")
            else:
                turns.append(ChatMessage("user", result))
        elif message.tool_calls:
            turns += with_written_calls([message], GENERIC)
        else:
            turns.append(message)
    if not tools:
        return turns
    first = turns[0]
    if first.role in ("system", "developer") or not system:
        return [replace(first, content=f"{block}\n\n{first.content or ''}"), *turns[1:]]
    return [ChatMessage("system", block), *turns]

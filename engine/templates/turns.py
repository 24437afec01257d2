"""Writes messages, calls and tools as chat templates expect them: the dictionaries of transformers. Renders nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from engine.types.messages import ChatMessage, ToolCall
from engine.types.tools import Tool

__all__ = ["TurnStyle", "definition_of", "turn_of"]

AS_TEXT: Final = "arguments"
"""The name under which a template that goes through arguments gets those that are no object."""
_LEVELS: Final = 100
"""Levels of arguments; templates write them by recursion."""


@dataclass(frozen=True, slots=True)
class TurnStyle:
    """How one template expects messages to be written.

    Attributes:
        developers: it speaks of developers; others get their turns as those of the system.
        thinking: it reads an assistant's thoughts under this name (gpt-oss).
        in_parts: a message's text must be a list of parts.
        arguments_as_text: it shows arguments that are text and no object.
    """

    developers: bool = False
    thinking: bool = False
    in_parts: bool = False
    arguments_as_text: bool = False


def turn_of(message: ChatMessage, style: TurnStyle) -> dict[str, Any]:
    """Write a message. One without content gets an empty text: many templates add it to another without asking."""
    content: Any = message.content or ""
    fields: dict[str, Any] = {
        "role": "system" if message.role == "developer" and not style.developers else message.role,
        "content": [{"type": "text", "text": content}] if style.in_parts else content,
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "thinking": message.reasoning_content if style.thinking else None,
        "tool_calls": [_call(call, style) for call in message.tool_calls] or None,
        "tool_call_id": message.tool_call_id,
    }
    # As transformers does: many templates write a None as the word None, and cope with a missing key.
    return {key: value for key, value in fields.items() if value is not None}


def definition_of(tool: Tool) -> dict[str, Any]:
    """Write a tool's definition as chat templates expect it, the shape of transformers and of the OpenAI API.

    `strict` is left out: the grammar enforces it, and the model need not know.
    """
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}


def _call(call: ToolCall, style: TurnStyle) -> dict[str, Any]:
    """Write a call. Its arguments are an object, as in transformers. What a model wrote that is none stays text.

    A template that goes through arguments one by one gets such a text as the only one.
    """
    arguments: Any = _object(call.arguments)
    if arguments is None:
        arguments = call.arguments if style.arguments_as_text else {AS_TEXT: call.arguments}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _object(text: str) -> dict[str, Any] | None:
    """Parse the arguments of a call; None if they are no JSON object, or none that a template could write."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    level: list[Any] = [value]
    for _ in range(_LEVELS):  # level by level, without recursion
        level = [
            part
            for node in level
            for part in (node.values() if isinstance(node, dict) else node)
            if isinstance(part, dict | list)
        ]
    return None if level else value

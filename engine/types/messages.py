"""The messages of a conversation, and the tool calls in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model makes.

    `arguments`: a JSON object as text; in earlier turns whatever a model wrote in its place, which stays text.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message. `role` is one of `system`, `developer`, `user`, `assistant`, `tool`.

    `reasoning_content`: an assistant's thoughts, for templates that show earlier thoughts to the model. `tool_calls`:
    what an assistant called; `tool_call_id`: the call that a `tool` message answers.
    """

    role: str
    content: str | None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

"""The messages of a request body, as `ChatMessage`s: roles, text parts, tool calls and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from engine import ChatMessage, InvalidFormat, InvalidParameter, ToolCall, Unsupported
from server.api.fields import MAX_NAME, ROLES
from server.api.parsing import LIST, OBJECT, STRING, at_most, optional, required, typed
from server.api.tools import call_arguments, call_id, function_name
from server.json_text import excess_of

MAX_MESSAGES: Final = 10_000
MAX_PARTS: Final = 10_000
"""Content parts of all messages together."""

MESSAGE_FIELDS: Final = frozenset({"role", "content", "name"})
CALL_FIELDS: Final = ("tool_calls", "tool_call_id")
PART_FIELDS: Final = frozenset({"type", "text"})
THOUGHTS: Final = ("reasoning_content", "reasoning")
"""The names under which clients send an assistant's thoughts back."""
_MAY_BE_SILENT: Final = ("assistant", "tool")
"""Roles whose turn may have no content: a model that called, or said, nothing; a function that returned nothing."""
UNSUPPORTED_MESSAGE_FIELDS: Final = ("function_call", "audio", "refusal")


def read_messages(data: Mapping[str, Any], ignored: list[str]) -> tuple[ChatMessage, ...]:
    """Read `messages`. Adds names of unknown fields to `ignored`.

    Raises:
        InvalidFormat: a message lacks a field, or has one of the wrong type.
        InvalidParameter: too many of something, a wrong role, or an answer to a call that nobody made.
        Unsupported: a part that is not text, or a field that this build cannot honour.
    """
    given = required(data, "messages", LIST)
    if not given:
        raise InvalidParameter("messages must hold at least one message, not 0.", param="messages")
    at_most(MAX_MESSAGES, len(given), "messages", "messages")
    contents = (message.get("content") for message in given if isinstance(message, dict))
    parts = sum(len(content) for content in contents if isinstance(content, list))
    at_most(MAX_PARTS, parts, "messages", "parts")
    messages = tuple(_message(message, f"messages.{i}", ignored) for i, message in enumerate(given))
    check_calls(messages)
    return messages


def check_calls(messages: Sequence[ChatMessage]) -> None:
    """Check the calls of all messages together, and that every answer is to one of them.

    Raises:
        InvalidParameter: an answer to a call that nobody made, or arguments that cannot be taken.
    """
    _check_answers(messages)
    _check_arguments(messages)


def _check_answers(messages: Sequence[ChatMessage]) -> None:
    """Check that each tool message answers a call made before it."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise InvalidParameter(
                f"messages.{i}.tool_call_id: no call before it has the id {message.tool_call_id[:100]!r}.",
                param=f"messages.{i}.tool_call_id",
            )
        called.update(call.id for call in message.tool_calls)


def _check_arguments(messages: Sequence[ChatMessage]) -> None:
    """Check that the arguments of all calls together are not too much. Those that are no JSON stay text."""
    if excess := excess_of(call.arguments for message in messages for call in message.tool_calls):
        raise InvalidParameter(
            f"The arguments in messages hold more than {excess}; at most that many are allowed.", param="messages"
        )


def _message(message: Any, at: str, ignored: list[str]) -> ChatMessage:
    typed(message, at, OBJECT)
    role = required(message, "role", STRING, f"{at}.")
    for name in UNSUPPORTED_MESSAGE_FIELDS:
        if message.get(name) not in (None, []):
            raise Unsupported(f"{at}.{name} is not supported by this build.", param=f"{at}.{name}")
    if role == "function":
        raise Unsupported(f"{at}.role: {role!r} is not supported by this build.", param=f"{at}.role")
    if role not in ROLES:
        raise InvalidParameter(f"{at}.role must be one of {', '.join(ROLES)}, not {role[:100]!r}.", param=f"{at}.role")
    name = optional(message, "name", STRING, f"{at}.")
    if name is not None and len(name) > MAX_NAME:
        raise InvalidParameter(
            f"{at}.name may have at most {MAX_NAME} characters, not {len(name)}.", param=f"{at}.name"
        )
    thoughts = [optional(message, key, STRING, f"{at}.") for key in THOUGHTS] if role == "assistant" else []
    known = MESSAGE_FIELDS.union(UNSUPPORTED_MESSAGE_FIELDS, CALL_FIELDS, THOUGHTS if role == "assistant" else ())
    ignored += [f"{at}.{key}" for key in message if key not in known]
    reasoning = next((text for text in thoughts if text), None)
    calls = _calls(message, at, role, ignored)
    answers = _answered(message, at, role)
    silent = role in _MAY_BE_SILENT and message.get("content") in (None, [])
    content = "" if silent else read_content(message, f"{at}.content", ignored)
    return ChatMessage(role, content, name, reasoning, calls, answers)


def _calls(message: Mapping[str, Any], at: str, role: str, ignored: list[str]) -> tuple[ToolCall, ...]:
    """Read the tool calls of an assistant's message."""
    at = f"{at}.tool_calls"
    given = typed(message["tool_calls"], at, LIST) if message.get("tool_calls") is not None else []
    if given and role != "assistant":
        raise InvalidParameter(f"{at}: only an assistant calls tools, not a {role}.", param=at)
    calls = []
    for i, call in enumerate(given):
        here = f"{at}.{i}."
        typed(call, here[:-1], OBJECT)
        kind = call.get("type")
        if kind not in (None, "function"):
            raise InvalidParameter(f"{here}type must be function, not {kind!r:.100}.", param=f"{here}type")
        function = required(call, "function", OBJECT, here)
        ignored += [f"{here}{key}" for key in call if key not in ("id", "type", "function", "index")]
        ignored += [f"{here}function.{key}" for key in function if key not in ("name", "arguments")]
        made = call_id(call, "id", here)
        named, arguments = (read(function, f"{here}function.") for read in (function_name, call_arguments))
        calls.append(ToolCall(made, named, arguments))
    return tuple(calls)


def _answered(message: Mapping[str, Any], at: str, role: str) -> str | None:
    """Read the id of the call that a tool's message answers; None for other roles."""
    if role == "tool":
        return call_id(message, "tool_call_id", f"{at}.")
    if message.get("tool_call_id") is not None:
        raise InvalidParameter(f"{at}.tool_call_id: only a tool answers a call.", param=f"{at}.tool_call_id")
    return None


def read_content(holder: Mapping[str, Any], at: str, ignored: list[str]) -> str:
    """Read the text of a `content` field, whose path is `at`. Parts are joined with nothing between them."""
    if "content" not in holder:
        raise InvalidFormat(f"{at} is required.", param=at, code="missing_field")
    content = holder["content"]
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidFormat(f"{at} may be null only in an assistant's or a tool's message.", param=at)
    if not typed(content, at, ((list,), "a string or a list of parts")):
        raise InvalidParameter(f"{at} must hold at least one part.", param=at)
    at_most(MAX_PARTS, len(content), at, "parts")
    return "".join(_part(part, f"{at}.{i}", ignored) for i, part in enumerate(content))


def _part(part: Any, at: str, ignored: list[str]) -> str:
    kind = required(typed(part, at, OBJECT), "type", STRING, f"{at}.")
    if kind != "text":
        raise Unsupported(
            f"{at}: a part of type {kind[:100]!r} is not supported; this server serves text only, no images, audio or "
            "files.",
            param=f"{at}.type",
        )
    text: str = required(part, "text", STRING, f"{at}.")
    ignored += [f"{at}.{key}" for key in part if key not in PART_FIELDS]
    return text

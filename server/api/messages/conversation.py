"""The system prompt and the messages of a body, as `ChatMessage`s."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from engine import ChatMessage, InvalidFormat, InvalidParameter
from server.api.chat_messages import MAX_MESSAGES, MAX_PARTS
from server.api.messages.blocks import assistant_turn, blocks_of, text_of, user_turns
from server.api.parsing import LIST, OBJECT, STRING, at_most, required, typed

__all__ = ["read_conversation", "read_prefill"]

_ROLES: Final = ("user", "assistant", "system")


def read_conversation(data: Mapping[str, Any], ignored: list[str]) -> tuple[ChatMessage, ...]:
    """Read `system` and `messages`. Turns of one role that follow each other are combined, as in Anthropic's API.

    Adds names of unknown fields to `ignored`.

    Raises:
        InvalidFormat: a message or a block lacks a field, or has one of the wrong type.
        InvalidParameter: too many of something, a wrong role, or the result of a call that nobody made.
        Unsupported: a block that this build cannot honour.
    """
    given = required(data, "messages", LIST)
    if not given:
        raise InvalidParameter("messages must hold at least one message, not 0.", param="messages")
    at_most(MAX_MESSAGES, len(given), "messages", "messages")
    contents = (message.get("content") for message in given if isinstance(message, dict))
    at_most(MAX_PARTS, sum(len(c) for c in contents if isinstance(c, list)), "messages", "blocks")
    turns: list[ChatMessage] = []
    if data.get("system") is not None and (system := text_of(blocks_of(data["system"], "system"), "system", ignored)):
        turns.append(ChatMessage("system", system))
    called: set[str] = set()
    for i, message in enumerate(given):
        found = _turns(message, f"messages.{i}", called, ignored)
        called.update(call.id for turn in found for call in turn.tool_calls)
        turns += found
    return tuple(_combined(turns))


def read_prefill(data: Mapping[str, Any], turns: Sequence[ChatMessage], *, spaces: bool = False) -> dict[str, str]:
    """Check a last message of the assistant, with which the reply goes on. Empty where the last one is not that.

    Returns what the engine calls the parts of this message, and where the body has them.

    Args:
        spaces: whether it may end with white space: it is only counted.

    Raises:
        InvalidParameter: it holds a call, or ends with white space, after which models write something else than after
            the words before it. Anthropic's API refuses both.
    """
    last = len(data["messages"]) - 1
    if turns[-1].role != "assistant" or data["messages"][last]["role"] != "assistant":
        return {}
    at, turn = f"messages.{last}", turns[-1]
    if turn.tool_calls:
        raise InvalidParameter(
            f"{at}.content: the last message is the assistant's, which the reply goes on with, and must hold no call.",
            param=f"{at}.content",
        )
    if turn.content and turn.content[-1].isspace() and not spaces:
        raise InvalidParameter(
            f"{at}.content: the last message is the assistant's, which the reply goes on with, and must not end with "
            "white space.",
            param=f"{at}.content",
        )
    own = f"messages.{len(turns) - 1}"
    return {f"{own}.reasoning_content": f"{at}.content", own: at, "continue_final_message": at}


def _turns(message: Any, at: str, called: set[str], ignored: list[str]) -> list[ChatMessage]:
    """Read one message. A user's is several turns if it has results of tools."""
    typed(message, at, OBJECT)
    role = required(message, "role", STRING, f"{at}.")
    if role not in _ROLES:
        raise InvalidParameter(f"{at}.role must be one of {', '.join(_ROLES)}, not {role[:100]!r}.", param=f"{at}.role")
    ignored += [f"{at}.{key}" for key in message if key not in ("role", "content")]
    if "content" not in message:
        raise InvalidFormat(f"{at}.content is required.", param=f"{at}.content", code="missing_field")
    content = message["content"]
    blocks = blocks_of([] if content is None and role == "assistant" else content, f"{at}.content")
    if role == "user":
        return user_turns(blocks, called, ignored)
    if role == "assistant":
        return [assistant_turn(blocks, ignored)]
    return [ChatMessage("system", text_of(blocks, "system", ignored))]


def _combined(turns: Iterable[ChatMessage]) -> list[ChatMessage]:
    """Combine turns of one role that follow each other; results of tools stay apart.

    Each text is copied once, however many turns there are.
    """
    found: list[list[ChatMessage]] = []
    for turn in turns:
        if found and turn.role == found[-1][0].role != "tool":
            found[-1].append(turn)
        else:
            found.append([turn])
    return [_one(parts) for parts in found]


def _one(parts: Sequence[ChatMessage]) -> ChatMessage:
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[0],
        content=_joined(part.content for part in parts),
        reasoning_content=_joined(part.reasoning_content for part in parts) or None,
        tool_calls=tuple(call for part in parts for call in part.tool_calls),
    )


def _joined(texts: Iterable[str | None]) -> str:
    return "\n".join(text for text in texts if text)

"""Content blocks of a message: texts, thoughts, tool calls and their results.

Types that this server cannot serve (images, documents, tools that run at Anthropic) are refused by their path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from engine import ChatMessage, InvalidParameter, ToolCall, Unsupported
from server.api.chat_messages import MAX_PARTS
from server.api.parsing import FLAG, LIST, OBJECT, STRING, at_most, optional, required, typed
from server.api.tools import call_id, function_name

__all__ = ["assistant_turn", "blocks_of", "text_of", "user_turns"]

_KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("user", "assistant", "system"),
    "tool_result": ("user",),
    "tool_use": ("assistant",),
    "thinking": ("assistant",),
    "redacted_thinking": ("assistant",),
}
"""The types of blocks that are read, and whose they are."""

Block = tuple[str, Mapping[str, Any]]
"""A block and its path."""


def blocks_of(content: Any, at: str) -> list[Block]:
    """Return the blocks of a content whose path is `at`; a string is one text block."""
    if isinstance(content, str):
        return [(at, {"type": "text", "text": content})]
    given = typed(content, at, ((str, list), "a string or a list of blocks"))
    at_most(MAX_PARTS, len(given), at, "blocks")
    return [(f"{at}.{i}", typed(block, f"{at}.{i}", OBJECT)) for i, block in enumerate(given)]


def text_of(blocks: Iterable[Block], whose: str, ignored: list[str]) -> str:
    """Return the text of blocks that may be nothing else, one below the other. `whose`: a role, for errors."""
    return "\n".join(_text(block, at, ignored) for at, block in _of(blocks, whose, ("text",)))


def user_turns(blocks: Iterable[Block], called: set[str], ignored: list[str]) -> list[ChatMessage]:
    """Read a user's blocks: first the results of tools, each a turn of its own, then the texts as one turn.

    Anthropic's API has results first, too. `called`: the ids of all calls before.
    """
    results: list[ChatMessage] = []
    texts: list[str] = []
    for at, block in _of(blocks, "user", ("text", "tool_result")):
        if block["type"] == "text":
            texts.append(_text(block, at, ignored))
        else:
            results.append(_result(block, at, called, ignored))
    return [*results, ChatMessage("user", "\n".join(texts))] if texts or not results else results


def assistant_turn(blocks: Iterable[Block], ignored: list[str]) -> ChatMessage:
    """Read the assistant's blocks as one turn: texts are joined as they are, because it wrote them as one."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for at, block in _of(blocks, "assistant", ("text", "thinking", "redacted_thinking", "tool_use")):
        if block["type"] == "text":
            texts.append(_text(block, at, ignored))
        elif block["type"] == "thinking":
            thoughts.append(required(block, "thinking", STRING, f"{at}."))
            optional(block, "signature", STRING, f"{at}.")
            _note_others(block, at, ("thinking", "signature"), ignored)
        elif block["type"] == "redacted_thinking":  # only Anthropic can read it
            ignored.append(at)
        else:
            calls.append(_call(block, at, ignored))
    return ChatMessage("assistant", "".join(texts), None, "\n".join(thoughts) or None, tuple(calls))


def _of(blocks: Iterable[Block], whose: str, allowed: tuple[str, ...]) -> Iterator[Block]:
    """Yield blocks whose type is allowed.

    Raises:
        InvalidParameter: a block is another role's; Unsupported: nobody's.
    """
    for at, block in blocks:
        kind = required(block, "type", STRING, f"{at}.")
        if kind in allowed:
            yield at, block
        elif kind in _KINDS:
            raise InvalidParameter(f"{at}.type: {kind} is no block of a {whose} message.", param=f"{at}.type")
        else:
            raise Unsupported(
                f"{at}.type: a block of type {kind[:100]!r} is not supported; this server serves text and tools only, "
                "no images, files or tools of its own.",
                param=f"{at}.type",
            )


def _text(block: Mapping[str, Any], at: str, ignored: list[str]) -> str:
    text: str = required(block, "text", STRING, f"{at}.")
    _note_others(block, at, ("text",), ignored)
    return text


def _result(block: Mapping[str, Any], at: str, called: set[str], ignored: list[str]) -> ChatMessage:
    found = call_id(block, "tool_use_id", f"{at}.")
    if found not in called:
        raise InvalidParameter(
            f"{at}.tool_use_id: no call before it has the id {found[:100]!r}.", param=f"{at}.tool_use_id"
        )
    content = block.get("content")
    text = "" if content is None else text_of(blocks_of(content, f"{at}.content"), "tool_result", ignored)
    if optional(block, "is_error", FLAG, f"{at}."):  # no template has a place for the flag
        text = f"Error: {text}" if text else "Error"
    _note_others(block, at, ("tool_use_id", "content", "is_error"), ignored)
    return ChatMessage("tool", text, tool_call_id=found)


def _call(block: Mapping[str, Any], at: str, ignored: list[str]) -> ToolCall:
    arguments = required(block, "input", OBJECT, f"{at}.")
    _note_others(block, at, ("id", "name", "input"), ignored)
    written = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call_id(block, "id", f"{at}."), function_name(block, f"{at}."), written)


def _note_others(block: Mapping[str, Any], at: str, known: tuple[str, ...], ignored: list[str]) -> None:
    """Name the other members of a block that ask for something. Caching needs no marks here."""
    optional(block, "cache_control", OBJECT, f"{at}.")
    if block.get("citations") is not None:
        typed(block["citations"], f"{at}.citations", LIST)
    names = (key for key in block if key not in ("type", "cache_control", *known))
    ignored += [f"{at}.{key}" for key in names if block[key] not in (None, [], {"type": "direct"})]

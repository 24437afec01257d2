"""Writes messages: engine outputs → one JSON object. Pure.

A reply is a row of blocks: thoughts, texts and calls, in the order in which the model wrote them. `pieces` says what a
step adds to it, for the whole message and for its events alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from engine import ChoiceDelta, RequestOutput, ToolCall, Usage
from server.api.generation import Reply
from server.json_text import load_text, to_json

__all__ = ["MessageCollector", "Piece", "begun", "ending", "message_head", "pieces", "usage_object"]

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_MEMBERS: Final = {"text": "text", "thinking": "thinking"}
"""The member of a block that grows."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step adds to the row of blocks: text or thoughts, or a call, which is a block of its own."""

    kind: str
    text: str = ""
    call: ToolCall | None = None
    input: dict[str, Any] | None = None
    """The arguments of the call."""


def pieces(delta: ChoiceDelta) -> Iterator[Piece]:
    """Yield what a delta adds to the blocks of its choice."""
    if delta.reasoning:
        yield Piece("thinking", delta.reasoning)
    if delta.text:
        yield Piece("text", delta.text)
    for call in delta.tool_calls:
        found = _object_of(call.arguments)
        if found is None:  # shown as it is: a call must have an object that clients can read
            yield Piece("text", to_json({"name": call.name, "arguments": call.arguments}))
        else:
            yield Piece("tool_use", to_json(found), call, found)


def begun(piece: Piece) -> dict[str, Any]:
    """Return the block that a piece begins, still without what the piece brings."""
    if piece.call is not None:
        return {"type": "tool_use", "id": piece.call.id, "name": piece.call.name, "input": {}}
    signature = {"signature": ""} if piece.kind == "thinking" else {}  # which nobody checks here
    return {"type": piece.kind, _MEMBERS[piece.kind]: "", **signature}


def ending(delta: ChoiceDelta, *, called: bool) -> dict[str, Any]:
    """Return what the last delta tells of a message. `called`: whether it has a block with a call."""
    reason = _REASONS[delta.finish_reason or "stop"]
    if delta.finish_reason == "stop" and delta.stop_string is not None:
        told: dict[str, Any] = {"stop_reason": "stop_sequence", "stop_sequence": delta.stop_string}
    else:
        told = {"stop_reason": reason if called or reason != "tool_use" else "end_turn", "stop_sequence": None}
    return told if delta.schema_error is None else {**told, "schema_error": delta.schema_error or None}


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return the counts of a reply. Tokens from the prefix cache are no part of `input_tokens`, as at Anthropic."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def message_head(reply: Reply) -> dict[str, Any]:
    """Return the members that a message begins with."""
    return {
        "id": reply.id,
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "system_fingerprint": reply.system_fingerprint,
        "seed": reply.params.seed,
    }


class MessageCollector:
    """Collects the outputs of one request into a message."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._blocks: list[dict[str, Any]] = []
        self._texts: list[str] = []  # of the last block
        self._last: ChoiceDelta | None = None
        self._usage = Usage(0, 0)

    @property
    def complete(self) -> bool:
        """Whether the reply has ended."""
        return self._last is not None

    def add(self, output: RequestOutput) -> None:
        self._usage = output.usage
        for delta in output.deltas:
            for piece in pieces(delta):
                self._add(piece)
            if delta.finish_reason:
                self._last = delta

    def body(self) -> dict[str, Any]:
        assert self._last is not None
        self._close()
        called = any(block["type"] == "tool_use" for block in self._blocks)
        return {
            **message_head(self._reply),
            "content": self._blocks,
            **ending(self._last, called=called),
            "usage": usage_object(self._usage),
        }

    def _add(self, piece: Piece) -> None:
        if piece.call is not None or not self._blocks or self._blocks[-1]["type"] != piece.kind:
            self._close()
            self._blocks.append(begun(piece))
        if piece.call is not None:
            self._blocks[-1]["input"] = piece.input
        else:
            self._texts.append(piece.text)

    def _close(self) -> None:
        if self._texts:
            block = self._blocks[-1]
            block[_MEMBERS[block["type"]]] += "".join(self._texts)
            self._texts = []


def _object_of(arguments: str) -> dict[str, Any] | None:
    """Return a call's arguments as the object that they are; None if they are none that can be sent.

    They are read by the rules of a body: not half a surrogate pair, no name twice; a number beyond those that clients
    can hold is the largest that they can.
    """
    try:
        found = load_text(arguments)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None

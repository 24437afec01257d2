"""Writes messages as the events of a stream. Pure.

    message_start  (content_block_start  content_block_delta …  content_block_stop) …  message_delta  message_stop

See https://docs.anthropic.com/en/docs/build-with-claude/streaming. The blocks are those of the whole message.
"""

from __future__ import annotations

from typing import Any, Final

from engine import ChoiceDelta, RequestOutput, Usage
from server.api.generation import Reply, event, with_member
from server.api.messages.reply import Piece, begun, ending, message_head, pieces, usage_object
from server.errors import anthropic_error, describe
from server.json_text import to_json

__all__ = ["MessageEvents"]

_DELTAS: Final = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""By a block's type: the type of its deltas, and the member that has their text."""


class MessageEvents:
    """Writes the outputs of one request as events."""

    def __init__(self, reply: Reply, include_usage: bool) -> None:
        """`include_usage`: without effect, because a message always tells it."""
        self._reply = reply
        self._begun = False
        self._open: str | None = None  # the type of the block that may grow
        self._index = -1
        self._called = False
        self._last = ChoiceDelta(0, "", ())

    def start(self) -> bytes:
        """Write nothing: how much of the prompt came from the cache is known with the first output."""
        return b""

    def add(self, output: RequestOutput) -> bytes:
        """Write the events of one step."""
        events = b"" if self._begun else self._start(output.usage)
        for delta in output.deltas:
            for piece in pieces(delta):
                events += self._piece(piece)
            if delta.finish_reason:
                self._last = delta
        return events

    def end(self, usage: Usage, receipt: bytes) -> bytes:
        """Write why the reply has ended, with the usage and the receipt, and the end of the stream."""
        told = {"type": "message_delta", "delta": ending(self._last, called=self._called), "usage": usage_object(usage)}
        data = with_member(to_json(told).encode(), receipt)
        return self._stop() + b"event: message_delta\ndata: " + data + b"\n\n" + _event({"type": "message_stop"})

    def fail(self, error: BaseException) -> bytes:
        """Write the error. Nothing follows it, `message_stop` neither."""
        status, body = describe(error)
        return _event(anthropic_error(body, status))

    def _start(self, usage: Usage) -> bytes:
        self._begun = True
        prompt = len(self._reply.requests[0].prompt_token_ids)
        message = {
            **message_head(self._reply),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_object(Usage(prompt, 0, usage.cached_tokens)),
        }
        return _event({"type": "message_start", "message": message})

    def _piece(self, piece: Piece) -> bytes:
        events = b""
        if piece.call is not None or self._open != piece.kind:
            events += self._stop()
            self._index, self._open = self._index + 1, piece.kind
            self._called = self._called or piece.call is not None
            events += _event({"type": "content_block_start", "index": self._index, "content_block": begun(piece)})
        kind, member = _DELTAS[piece.kind]
        return events + self._delta({"type": kind, member: piece.text})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _stop(self) -> bytes:
        """End the block that is open. Clients keep thoughts only with a signature, so an empty one is told."""
        if self._open is None:
            return b""
        signed = self._delta({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else b""
        self._open = None
        return signed + _event({"type": "content_block_stop", "index": self._index})


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])

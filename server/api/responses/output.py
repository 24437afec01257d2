"""`OutputItems`: what the engine adds to a reply → the items of a response, and the events that tell of them. Pure.

Thoughts and text become items in the order in which they come, each one item for as long as nothing else comes between.
Calls are told at the end: where a call stands between texts, how the reply was cut into steps would show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from engine import ChoiceDelta, FinishReason, ToolCall
from server.api.chat_reply import logprob_object
from server.api.generation import Reply
from server.api.responses.thoughts import packed_thoughts

__all__ = ["Event", "OutputItems"]

Event = dict[str, Any]
"""An event without its `sequence_number`."""

_PREFIXES: Final = {"reasoning": "rs", "message": "msg"}
_PARTS: Final = {"reasoning": "reasoning_text", "message": "output_text"}


@dataclass(slots=True)
class _Open:
    """The item that is being written. `place`: what its events name it by."""

    kind: str
    place: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class OutputItems:
    """Collects the deltas of the one choice of a response. `items` are those that are whole."""

    def __init__(self, reply: Reply) -> None:
        self.items: list[dict[str, Any]] = []
        self.finish_reason: FinishReason | None = None
        self._suffix = reply.id.removeprefix("resp_")
        self._names = reply.repeated["names"]
        self._packed = reply.repeated["packed"]
        self._open: _Open | None = None
        self._calls: list[ToolCall] = []
        self._entries: list[dict[str, Any]] = []  # log-probabilities that no event has told yet

    def add(self, delta: ChoiceDelta) -> Iterator[Event]:
        """Take in a delta. Yields the events that tell of it; those of the end with the one that ends the reply."""
        if delta.reasoning:
            yield from self._turn_to("reasoning")
            yield self._more(delta.reasoning)
        self._entries += [logprob_object(entry) for entry in delta.logprobs or ()]
        if delta.text:
            yield from self._turn_to("message")
            yield self._more(delta.text)
        self._calls += delta.tool_calls
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            yield from self._end()

    def _end(self) -> Iterator[Event]:
        told = any(item["type"] == "message" for item in self.items)
        if self.finish_reason == "stop" and not told:  # clients take a reply without a message for an unfinished one
            yield from self._turn_to("message")
        if self._open is not None:
            yield from self._close("incomplete" if self.finish_reason == "length" else "completed")
        for call in self._calls:
            yield from self._call(call)

    def _turn_to(self, kind: str) -> Iterator[Event]:
        """Have an item of this kind open, the one before it closed."""
        if self._open is not None:
            if self._open.kind == kind:
                return
            yield from self._close("completed")
        index = len(self.items)
        item_id = f"{_PREFIXES[kind]}_{self._suffix}_{index}"
        self._open = _Open(kind, {"item_id": item_id, "output_index": index, "content_index": 0})
        item = self._item(self._open, [], "in_progress")
        yield {"type": "response.output_item.added", "output_index": index, "item": item}
        yield {"type": "response.content_part.added", **self._open.place, "part": self._part(self._open, "", [])}

    def _more(self, text: str) -> Event:
        """Add text to the open item, and to the answer's the log-probabilities that have come since its last text."""
        assert self._open is not None
        self._open.texts.append(text)
        event = {"type": f"response.{_PARTS[self._open.kind]}.delta", **self._open.place, "delta": text}
        if self._open.kind == "message":
            event["logprobs"], self._entries = self._entries, []
            self._open.logprobs += event["logprobs"]
        return event

    def _close(self, status: str) -> Iterator[Event]:
        assert self._open is not None
        if self._open.kind == "message" and self._entries:
            yield self._more("")
        last, self._open = self._open, None
        text = "".join(last.texts)
        part = self._part(last, text, last.logprobs)
        logprobs = {"logprobs": last.logprobs} if last.kind == "message" else {}
        yield {"type": f"response.{_PARTS[last.kind]}.done", **last.place, "text": text, **logprobs}
        yield {"type": "response.content_part.done", **last.place, "part": part}
        item = self._item(last, [part], status)
        self.items.append(item)
        yield {"type": "response.output_item.done", "output_index": last.place["output_index"], "item": item}

    def _item(self, item: _Open, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
        head = {"id": item.place["item_id"], "type": item.kind, "status": status}
        if item.kind == "message":
            return {**head, "role": "assistant", "content": content}
        packed = (
            {"encrypted_content": packed_thoughts("".join(item.texts)) if content else None} if self._packed else {}
        )
        return {**head, "summary": [], "content": content, **packed}

    @staticmethod
    def _part(item: _Open, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if item.kind == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
        return {"type": "reasoning_text", "text": text}

    def _call(self, call: ToolCall) -> Iterator[Event]:
        index = len(self.items)
        namespace, name = self._names.get(call.name, (None, call.name))
        item = {
            "id": f"fc_{self._suffix}_{index}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": name,
            "arguments": call.arguments,
            **({} if namespace is None else {"namespace": namespace}),
        }
        self.items.append(item)
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield {"type": "response.output_item.added", "output_index": index, "item": begun}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments}
        told = {"name": name, "arguments": call.arguments}
        yield {"type": "response.function_call_arguments.done", **place, **told}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}

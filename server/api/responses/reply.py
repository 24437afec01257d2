"""Writes responses: engine outputs → one JSON object, or the events of a stream. Pure.

Both are built from the same items, and the event that ends a stream holds the object.
"""

from __future__ import annotations

from typing import Any, Final

from engine import RequestOutput, Usage
from server.api.chat_reply import prompt_logprobs_object
from server.api.formats import FORMAT_FIELDS
from server.api.generation import Reply, event, with_member
from server.api.responses.output import Event, OutputItems
from server.api.responses.tools import shown_tool
from server.errors import describe
from server.json_text import to_json

__all__ = ["ResponseCollector", "ResponseEvents"]

_RECORDS: Final = ("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")
"""Fields of the body that a response repeats where they are there."""
_FORM: Final = ("type", *FORMAT_FIELDS)


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        # Writing to the cache is neither counted nor charged here.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def response_object(reply: Reply, status: str, output: list[dict[str, Any]], **told: Any) -> dict[str, Any]:
    """Return a response. `told`: members that are null, or absent, unless something is known of them."""
    fields, params = reply.repeated["fields"], reply.params
    form, reasoning = fields.get("text", {}).get("format") or {"type": "text"}, fields.get("reasoning", {})
    return {
        "id": reply.id,
        "object": "response",
        "created_at": reply.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "max_tool_calls": fields.get("max_tool_calls"),
        "model": reply.model,
        "output": output,
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": {"format": {name: value for name, value in form.items() if name in _FORM}, "verbosity": "medium"},
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": [shown_tool(tool) for tool in fields.get("tools", [])],
        "top_logprobs": params.top_logprobs,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": fields.get("metadata", {}),
        **{name: fields[name] for name in _RECORDS if name in fields},
        "system_fingerprint": reply.system_fingerprint,
        "seed": params.seed,
        **told,
    }


class _Told:
    """What a reply tells beside its items: its usage, and what the extensions ask for."""

    def __init__(self, reply: Reply) -> None:
        self._params = reply.params
        self._usage = Usage(0, 0)
        self._token_ids: list[int] = []
        self._margins: list[float | None] = []
        self._more: dict[str, Any] = {}

    def add(self, output: RequestOutput) -> None:
        self._usage = output.usage
        most = self._params.prompt_logprobs
        if output.prompt_logprobs is not None and most is not None:
            self._more["prompt_logprobs"] = prompt_logprobs_object(output.prompt_logprobs, most)
        for delta in output.deltas:
            self._token_ids += delta.token_ids
            self._margins += delta.margins or ()
            if delta.schema_error is not None:
                self._more["schema_error"] = delta.schema_error or None

    def members(self, finish_reason: str | None) -> dict[str, Any]:
        found = {"usage": usage_object(self._usage), **self._more}
        if finish_reason == "length":
            found["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._params.return_token_ids:
            found["token_ids"] = self._token_ids
        if self._params.margins:
            found["margins"] = self._margins
        return found


class ResponseCollector:
    """Collects the outputs of one request into a `response`."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._items = OutputItems(reply)
        self._told = _Told(reply)

    @property
    def complete(self) -> bool:
        """Whether the reply has ended."""
        return self._items.finish_reason is not None

    def add(self, output: RequestOutput) -> None:
        for _ in self.events(output):
            pass

    def events(self, output: RequestOutput) -> list[Event]:
        """Take in what one step has generated. Returns the events that tell of it."""
        self._told.add(output)
        return [event for delta in output.deltas for event in self._items.add(delta)]

    @property
    def status(self) -> str:
        return "incomplete" if self._items.finish_reason == "length" else "completed"

    def body(self) -> dict[str, Any]:
        told = self._told.members(self._items.finish_reason)
        return response_object(self._reply, self.status, self._items.items, **told)

    def failed(self, error: BaseException) -> dict[str, Any]:
        """Return the response of a reply that an error has ended, with the items that were whole."""
        found = describe(error)[1]["error"]
        told = {"code": "server_error", "message": found["message"], "type": found["code"], "param": found["param"]}
        return response_object(self._reply, "failed", self._items.items, error=told)


class ResponseEvents:
    """Writes the outputs of one request as the events of a stream, numbered from 0."""

    def __init__(self, reply: Reply, include_usage: bool) -> None:
        """`include_usage`: whether it was asked for; the last event has it anyway."""
        self._reply = reply
        self._collected = ResponseCollector(reply)
        self._number = 0

    def start(self) -> bytes:
        """Write that there is a response, with no items yet."""
        begun = to_json(response_object(self._reply, "in_progress", [])).encode()
        return self._response("created", begun) + self._response("in_progress", begun)

    def add(self, output: RequestOutput) -> bytes:
        """Write the events of one step: what the items gained, and those that began or ended."""
        return b"".join([self._event(told) for told in self._collected.events(output)])

    def end(self, usage: Usage, receipt: bytes) -> bytes:
        """Write the whole response, and its receipt if it was asked for."""
        whole = with_member(to_json(self._collected.body()).encode(), receipt)
        return self._response(self._collected.status, whole)

    def fail(self, error: BaseException) -> bytes:
        """Write that the response has failed, and why. Nothing follows."""
        return self._response("failed", to_json(self._collected.failed(error)).encode())

    def _response(self, status: str, response: bytes) -> bytes:
        """Write an event that holds a response."""
        name = f"response.{status}"
        head = to_json({"type": name, "sequence_number": self._next()}).encode()
        return f"event: {name}\ndata: ".encode() + with_member(head, b'"response":' + response) + b"\n\n"

    def _event(self, told: Event) -> bytes:
        return event({**told, "sequence_number": self._next()}, told["type"])

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

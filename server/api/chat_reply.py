"""Writes chat completions: engine outputs → one JSON object, or the chunks of a stream. Pure.

Both are built from the same deltas. A chunk's constant parts are encoded once per request; what remains per token is
one text and, if requested, its logprobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from engine import (
    ChoiceDelta,
    FinishReason,
    RequestOutput,
    TokenLogprob,
    ToolCall,
    Usage,
    clean_logprob,
)
from server.api.generation import Reply, event, with_member
from server.errors import describe
from server.json_text import escape_line_breaks, to_json

DONE = b"data: [DONE]\n\n"


def reply_head(reply: Reply, kind: str) -> dict[str, Any]:
    """Return the fields that the body and every chunk begin with."""
    return {
        "id": reply.id,
        "object": kind,
        "created": reply.created,
        "model": reply.model,
        "system_fingerprint": reply.system_fingerprint,
        "seed": reply.params.seed,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_prediction_tokens,
            "rejected_prediction_tokens": usage.rejected_prediction_tokens,
        },
    }


def last_events(head: dict[str, Any], usage: Usage | None, receipt: bytes) -> bytes:
    """Write a stream's last chunk, without choices, if it has something to say; and `[DONE]`.

    `receipt`: as in `EventWriter.end`.
    """
    if usage is None and not receipt:
        return DONE
    told = {} if usage is None else {"usage": usage_object(usage)}
    return b"data: " + with_member(to_json({**head, "choices": [], **told}).encode(), receipt) + b"\n\n" + DONE


def error_event(error: BaseException) -> bytes:
    """Write the event that ends the stream of a reply that failed. Nothing follows it, `[DONE]` neither."""
    return event(describe(error)[1])


def logprob_object(entry: TokenLogprob) -> dict[str, Any]:
    return {
        "token": entry.token,
        "logprob": clean_logprob(entry.logprob),
        "bytes": list(entry.bytes),
        "top_logprobs": [
            {"token": t.token, "logprob": clean_logprob(t.logprob), "bytes": list(t.bytes)} for t in entry.top
        ],
    }


def prompt_logprobs_object(entries: Sequence[TokenLogprob | None], most: int) -> list[dict[str, Any] | None]:
    """Write a prompt's log-probabilities as vLLM does: by token id, the prompt's token first, then the likeliest.

    `most`: alternatives beside each token.
    """

    def written(entry: TokenLogprob) -> dict[str, Any]:
        found = {entry.token_id: (entry.logprob, entry.rank, entry.token)}
        for rank, top in enumerate(entry.top[:most], 1):
            found.setdefault(top.token_id, (top.logprob, rank, top.token))
        return {
            str(token_id): {"logprob": clean_logprob(logprob), "rank": rank, "decoded_token": token}
            for token_id, (logprob, rank, token) in found.items()
        }

    return [None if entry is None else written(entry) for entry in entries]


def call_object(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(entries: Iterable[TokenLogprob] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": [logprob_object(e) for e in entries], "refusal": None}


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    schema_error: str | None = None


class Collector:
    """Collects the outputs of one request into a `chat.completion`."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._choices = [_Choice() for _ in range(reply.num_choices)]
        self._usage = Usage(0, 0)
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason for choice in self._choices)

    def add(self, output: RequestOutput) -> None:
        self._usage = output.usage
        most = self._reply.params.prompt_logprobs
        if output.prompt_logprobs is not None and most is not None:
            self._prompt_logprobs = prompt_logprobs_object(output.prompt_logprobs, most)
        for delta in output.deltas:
            choice = self._choices[delta.index]
            choice.text.append(delta.text)
            choice.reasoning.append(delta.reasoning)
            choice.calls += delta.tool_calls
            choice.token_ids += delta.token_ids
            choice.logprobs += delta.logprobs or ()
            choice.margins += delta.margins or ()
            choice.finish_reason = delta.finish_reason or choice.finish_reason
            choice.schema_error = delta.schema_error

    def body(self) -> dict[str, Any]:
        return {
            **reply_head(self._reply, "chat.completion"),
            "choices": [self._choice(i, choice) for i, choice in enumerate(self._choices)],
            "usage": usage_object(self._usage),
            **({} if self._prompt_logprobs is None else {"prompt_logprobs": self._prompt_logprobs}),
        }

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        params = self._reply.params
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        if reasoning := "".join(choice.reasoning):
            message["reasoning_content"] = reasoning
        if choice.calls:
            message["tool_calls"] = [call_object(call) for call in choice.calls]
            message["content"] = message["content"] or None
        result = {
            "index": index,
            "message": message,
            "logprobs": _logprobs(choice.logprobs if params.logprobs else None),
            "finish_reason": choice.finish_reason,
        }
        if choice.schema_error is not None:
            result["schema_error"] = choice.schema_error or None
        if params.return_token_ids:
            result["token_ids"] = choice.token_ids
        if params.margins:
            result["margins"] = choice.margins
        return result


class ChunkWriter:
    """Writes the outputs of one request as `chat.completion.chunk` events."""

    def __init__(self, reply: Reply, include_usage: bool) -> None:
        self._reply = reply
        self._include_usage = include_usage
        head = to_json(reply_head(reply, "chat.completion.chunk"))
        self._prefix = f"data: {head[:-1]}," + '"choices":['
        self._suffix = ("]" + (',"usage":null' if include_usage else "") + "}\n\n").encode()
        params = reply.params
        self._token_ids, self._margins = params.return_token_ids, params.margins
        self._prompt_logprobs = params.prompt_logprobs
        self._calls = [0] * reply.num_choices

    def start(self) -> bytes:
        """Write one chunk per choice, with the role and an empty text; later, if the first has more to say."""
        return self._roles() if self._prompt_logprobs is None else b""

    def add(self, output: RequestOutput) -> bytes:
        """Write the events of one step: what each choice gained, and the end of each choice that ended."""
        first = b""
        if output.prompt_logprobs is not None and self._prompt_logprobs is not None:
            first = self._roles(prompt_logprobs_object(output.prompt_logprobs, self._prompt_logprobs))
        return first + b"".join([self._delta(delta) for delta in output.deltas])

    def end(self, usage: Usage, receipt: bytes) -> bytes:
        """Write the usage and the receipt, if they were asked for, and `[DONE]`."""
        head = reply_head(self._reply, "chat.completion.chunk")
        return last_events(head, usage if self._include_usage else None, receipt)

    def fail(self, error: BaseException) -> bytes:
        return error_event(error)

    def _roles(self, prompt_logprobs: list[dict[str, Any] | None] | None = None) -> bytes:
        role = '{"role":"assistant","content":"","refusal":null}'
        chunks = [self._chunk(i, role) for i in range(self._reply.num_choices)]
        if prompt_logprobs is not None:
            told = b'data: {"prompt_logprobs":' + to_json(prompt_logprobs).encode() + b","
            chunks[0] = told + chunks[0].removeprefix(b"data: {")
        return b"".join(chunks)

    def _delta(self, delta: ChoiceDelta) -> bytes:
        events = b""
        if delta.text or delta.reasoning or delta.logprobs or self._token_ids or self._margins:
            text = '{"content":' + escape_line_breaks(encode_basestring(delta.text)) + "}"
            if delta.reasoning:
                thought = '{"reasoning_content":' + escape_line_breaks(encode_basestring(delta.reasoning))
                text = thought + "," + text[1:] if delta.text else thought + "}"
            logprobs = "null" if delta.logprobs is None else to_json(_logprobs(delta.logprobs))
            extra = f',"token_ids":{list(delta.token_ids)}' if self._token_ids else ""
            extra += f',"margins":{to_json(list(delta.margins or ()))}' if self._margins else ""
            events = self._chunk(delta.index, text, logprobs, extra=extra)
        for call in delta.tool_calls:
            number, self._calls[delta.index] = self._calls[delta.index], self._calls[delta.index] + 1
            whole = call_object(call)
            named = {**whole, "function": {"name": call.name, "arguments": ""}}
            written = {"function": {"arguments": call.arguments}}
            for part in (named, written):
                events += self._chunk(delta.index, to_json({"tool_calls": [{"index": number, **part}]}))
        if delta.finish_reason:
            checked = delta.schema_error is not None
            extra = f',"schema_error":{to_json(delta.schema_error or None)}' if checked else ""
            events += self._chunk(delta.index, "{}", finish=f'"{delta.finish_reason}"', extra=extra)
        return events

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null", extra: str = "") -> bytes:
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}{extra}}}'
        return (self._prefix + choice).encode() + self._suffix

"""Writes completions of plain text: engine outputs → one JSON object, or the chunks of a stream. Pure.

Both are built from the same parts. A part is what one step adds to one choice. With `echo` the first part of a choice
begins with its prompt.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine import ChoiceDelta, EchoedPrompt, RequestOutput, TokenLogprob, Usage, clean_logprob
from server.api.chat_reply import error_event, last_events, prompt_logprobs_object, reply_head, usage_object
from server.api.generation import Reply
from server.json_text import to_json

__all__ = ["CompletionChunks", "CompletionCollector"]

_KIND = "text_completion"


@dataclass(slots=True)
class _Logprobs:
    """The four lists in which completions write log-probabilities."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: str, entry: TokenLogprob | None, most: int, offset: int) -> None:
        self.tokens.append(token)
        self.text_offset.append(offset)
        self.token_logprobs.append(None if entry is None else clean_logprob(entry.logprob))
        self.top_logprobs.append(None if entry is None else _top(entry, most))

    def extend(self, other: _Logprobs) -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset


def _top(entry: TokenLogprob, most: int) -> dict[str, float]:
    """The likeliest tokens and the token itself, likeliest first. Of tokens that look alike the likeliest counts."""
    found: dict[str, float] = {}
    for name, logprob in [*((top.token, top.logprob) for top in entry.top[:most]), (entry.token, entry.logprob)]:
        found.setdefault(name, clean_logprob(logprob))
    return found


class _Offsets:
    """Counts the characters before each token of a choice, from the tokens' bytes: text may be held back, they not."""

    def __init__(self, start: int) -> None:
        self._characters = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def before(self, data: bytes) -> int:
        """Return the place of a token with these bytes."""
        place = self._characters
        self._characters += len(self._decoder.decode(data))
        return place


@dataclass(slots=True)
class _Part:
    """What one step adds to one choice. `delta`: None before the first token."""

    index: int
    text: str
    delta: ChoiceDelta | None
    logprobs: _Logprobs | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class _Parts:
    """Turns the outputs of a reply's requests into parts."""

    def __init__(self, reply: Reply) -> None:
        self._numbers = {request.request_id: number for number, request in enumerate(reply.requests)}
        self._requests = reply.requests
        self._n = reply.params.n
        self._begun = [False] * len(reply.requests)
        params = reply.params
        self._logprobs = params.top_logprobs if params.logprobs else None
        self._waits = params.prompt_logprobs is not None
        self._prompt_logprobs = reply.prompt_logprobs
        self._offsets = [_Offsets(len(self._echo_text(i // self._n))) for i in range(reply.num_choices)]

    def of(self, output: RequestOutput) -> Iterator[_Part]:
        """Yield the parts of one output."""
        number = self._numbers[output.request_id]
        if not self._begun[number] and (output.prompt_logprobs is not None or (output.deltas and not self._waits)):
            self._begun[number] = True
            yield from self._beginning(number, output.prompt_logprobs)
        for delta in output.deltas:
            yield _Part(delta.index, delta.text, delta, self._drawn(delta))

    def _beginning(self, number: int, entries: tuple[TokenLogprob | None, ...] | None) -> Iterator[_Part]:
        """Yield what comes before the first token: the prompt, its log-probabilities."""
        echo, asked = self._requests[number].echo, self._prompt_logprobs
        told = None if entries is None or asked is None else prompt_logprobs_object(entries, asked)
        if echo is None and told is None:
            return
        logprobs = self._echoed(echo, entries) if echo is not None else None
        for index in range(number * self._n, (number + 1) * self._n):
            yield _Part(index, self._echo_text(number), None, logprobs, told)

    def _echo_text(self, number: int) -> str:
        echo = self._requests[number].echo
        return echo.text if echo is not None else ""

    def _echoed(self, echo: EchoedPrompt, entries: tuple[TokenLogprob | None, ...] | None) -> _Logprobs | None:
        if self._logprobs is None or entries is None:
            return None
        found = _Logprobs()
        for token, entry, offset in zip(echo.tokens, entries, echo.offsets, strict=True):
            found.add(token, entry, self._logprobs, offset)
        return found

    def _drawn(self, delta: ChoiceDelta) -> _Logprobs | None:
        if self._logprobs is None:
            return None
        found, offsets = _Logprobs(), self._offsets[delta.index]
        for entry in delta.logprobs or ():
            found.add(entry.token, entry, self._logprobs, offsets.before(entry.bytes))
        return found


def _choice(reply: Reply, index: int, text: str, logprobs: _Logprobs | None, delta: Any) -> dict[str, Any]:
    """Write a choice, whole or the part of it in a chunk. `delta`: has the other fields of a `ChoiceDelta`."""
    result: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": None if logprobs is None else dataclasses.asdict(logprobs),
        "finish_reason": delta.finish_reason,
    }
    if delta.schema_error is not None:
        result["schema_error"] = delta.schema_error or None
    if reply.params.return_token_ids:
        result["token_ids"] = list(delta.token_ids)
    if reply.params.margins:
        result["margins"] = list(delta.margins or ())
    return result


@dataclass(slots=True)
class _Whole:
    """A choice while it is collected; has the fields of a `ChoiceDelta` that `_choice` writes."""

    text: list[str] = field(default_factory=list)
    logprobs: _Logprobs = field(default_factory=_Logprobs)
    token_ids: list[int] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    finish_reason: str | None = None
    schema_error: str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionCollector:
    """Collects the outputs of a reply's requests into a `text_completion`."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._parts = _Parts(reply)
        self._choices = [_Whole() for _ in range(reply.num_choices)]
        self._usage = Usage(0, 0)

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason for choice in self._choices)

    def add(self, output: RequestOutput) -> None:
        self._usage = output.usage
        for part in self._parts.of(output):
            choice, delta = self._choices[part.index], part.delta
            choice.text.append(part.text)
            choice.prompt_logprobs = part.prompt_logprobs or choice.prompt_logprobs
            if part.logprobs is not None:
                choice.logprobs.extend(part.logprobs)
            if delta is not None:
                choice.token_ids += delta.token_ids
                choice.margins += delta.margins or ()
                choice.finish_reason = delta.finish_reason or choice.finish_reason
                choice.schema_error = delta.schema_error

    def body(self) -> dict[str, Any]:
        return {
            **reply_head(self._reply, _KIND),
            "choices": [self._choice(i, choice) for i, choice in enumerate(self._choices)],
            "usage": usage_object(self._usage),
        }

    def _choice(self, index: int, choice: _Whole) -> dict[str, Any]:
        logprobs = choice.logprobs if self._reply.params.logprobs else None
        told = {} if choice.prompt_logprobs is None else {"prompt_logprobs": choice.prompt_logprobs}
        return {**_choice(self._reply, index, "".join(choice.text), logprobs, choice), **told}


class CompletionChunks:
    """Writes the outputs of a reply's requests as the events of a streamed `text_completion`."""

    def __init__(self, reply: Reply, include_usage: bool) -> None:
        self._reply = reply
        self._parts = _Parts(reply)
        self._include_usage = include_usage
        self._prefix = f"data: {to_json(reply_head(reply, _KIND))[:-1]}," + '"choices":['
        self._suffix = "]" + (',"usage":null' if include_usage else "") + "}\n\n"
        self._shows_tokens = reply.params.return_token_ids or reply.params.margins

    def start(self) -> bytes:
        """Write nothing: what a choice begins with is known with its first output."""
        return b""

    def add(self, output: RequestOutput) -> bytes:
        """Write the events of one step: what each choice gained, and the end of each choice that ended."""
        return "".join(self._chunks(self._parts.of(output))).encode()

    def end(self, usage: Usage, receipt: bytes) -> bytes:
        """Write the usage and the receipt, if they were asked for, and `[DONE]`."""
        return last_events(reply_head(self._reply, _KIND), usage if self._include_usage else None, receipt)

    def fail(self, error: BaseException) -> bytes:
        return error_event(error)

    def _chunks(self, parts: Iterable[_Part]) -> Iterator[str]:
        for part in parts:
            delta = part.delta or ChoiceDelta(part.index, "", ())
            entries = part.logprobs.tokens if part.logprobs is not None else ()
            tokens = delta.token_ids if self._shows_tokens else ()
            if not (part.text or entries or tokens or part.prompt_logprobs or delta.finish_reason):
                continue
            choice = _choice(self._reply, part.index, part.text, part.logprobs, delta)
            if part.prompt_logprobs is not None:
                choice["prompt_logprobs"] = part.prompt_logprobs
            yield self._prefix + to_json(choice) + self._suffix

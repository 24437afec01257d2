"""`ReplyWatch`: counts one reply, however it ends, and measures its times while the engine's outputs arrive.

    began ──▶ submit ──(queue)──▶ first token ──▶ … ──▶ last token      outputs, as they arrive: read or not
                                                └──▶ client leaves ──▶ what was computed meanwhile counts, too

Tokens are counted from the usage that the reply and the ledger have, so that the sums agree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from engine import RequestOutput, RequestStream, Usage
from server.errors import ClientGone
from server.metrics.counts import ModelCounts

__all__ = ["ReplyWatch"]

_NOTHING = Usage(0, 0)


class ReplyWatch:
    """Watches the requests of one reply, from their submission to the last that is computed for them.

    A context: enter it before the first request is submitted; leave it once all are ended or aborted. A reply of which
    no request was accepted counts as a refusal, and not here.

    Args:
        counts: those of the reply's model.
        clock: seconds that never fall.
        began: when the request's body had been read, by the same clock.
    """

    def __init__(self, counts: ModelCounts, clock: Callable[[], float], began: float) -> None:
        self._counts, self._clock, self._began = counts, clock, began
        self._requests: list[_RequestWatch] = []
        self._first = True

    def __enter__(self) -> ReplyWatch:
        return self

    def runs(self, stream: RequestStream, choices: int) -> None:
        """Note that the engine has accepted a request of the reply, of so many choices, and answers it here."""
        watch = _RequestWatch(self, stream, self._counts, self._clock, choices)
        stream.on_output = watch.note
        self._requests.append(watch)

    def starts(self, now: float) -> None:
        """Note tokens of one of its requests, which may be the reply's first."""
        if self._first:
            self._first = False
            self._counts.first_token.observe(now - self._began)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._requests:
            return
        gone = isinstance(error, ClientGone | asyncio.CancelledError | GeneratorExit)
        if any(one.stream.error is not None for one in self._requests) or (error is not None and not gone):
            self._counts.outcomes["error"] += 1
        elif all(len(one.stream.finish_reasons) == one.choices for one in self._requests):
            self._counts.outcomes["complete"] += 1
            self._counts.whole.observe(max(one.last for one in self._requests) - self._began)
        else:
            self._counts.outcomes["disconnected"] += 1
        for one in self._requests:
            one.leave()


class _RequestWatch:
    """Watches one request of the engine.

    Attributes:
        last: when its last output arrived.
    """

    __slots__ = ("_clock", "_counts", "_first", "_late", "_prompt", "_reply", "_tokens", "choices", "last", "stream")

    def __init__(
        self,
        reply: ReplyWatch,
        stream: RequestStream,
        counts: ModelCounts,
        clock: Callable[[], float],
        choices: int,
    ) -> None:
        self._reply, self._counts, self._clock = reply, counts, clock
        self.stream, self.choices = stream, choices
        self._prompt = self._tokens = 0  # counted so far
        self._late = 0  # tokens of its longest choices after its first output that had any
        self._first = self.last = 0.0

    def note(self, output: RequestOutput) -> None:
        """Note an output when it arrives: at most two observations, whatever the number of its tokens."""
        now, counts = self._clock(), self._counts
        if output.queued_seconds is not None:
            counts.queue_time.observe(output.queued_seconds)
        new = output.usage.completion_tokens - self._tokens
        if new > 0:
            if self._tokens:
                most = max((len(delta.token_ids) for delta in output.deltas), default=1) or 1
                counts.between_tokens.observe((now - self.last) / most)
                self._late += most
            else:
                self._first = now
                self._reply.starts(now)
                self._count_prompt(output.usage.prompt_tokens, now)
            self._tokens += new
            counts.generation_tokens += new
            counts.generation_rate.add(now, new)
        self.last = now
        for delta in output.deltas:
            if delta.finish_reason is not None:
                counts.reasons[delta.finish_reason] += 1
        if output.finished and output.error is None and self._late:
            counts.per_token.observe((now - self._first) / self._late)

    def leave(self) -> None:
        """Count what is not counted yet, once the engine has let go of the request."""
        leaving = self.stream.leaving
        if leaving is None or leaving.done():
            self._settle()
        else:
            leaving.add_done_callback(lambda _: self._settle())

    def _settle(self) -> None:
        usage, now = self.stream.usage or _NOTHING, self._clock()
        self._count_prompt(usage.prompt_tokens, now)
        self._counts.cached_tokens += usage.cached_tokens
        self._counts.generation_tokens += max(usage.completion_tokens - self._tokens, 0)

    def _count_prompt(self, tokens: int, now: float) -> None:
        new = max(tokens - self._prompt, 0)
        self._prompt += new
        self._counts.prompt_tokens += new
        self._counts.prompt_rate.add(now, new)

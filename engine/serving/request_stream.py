"""`RequestStream`: the outputs of one request, on the event loop that submitted it. `JoinedStreams`: those of several.

Knows no engine and no thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import operator
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from engine.errors import VerbatimError
from engine.types.outputs import RequestOutput, Usage

__all__ = ["JoinedStreams", "RequestStream"]


class RequestStream(AsyncIterator[RequestOutput]):
    """Yields the outputs of one request as they arrive; ends after the one that is `finished`.

    For one reader, on the event loop that submitted the request.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._outputs: deque[RequestOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None  # the reader, while it waits
        self._ended = False
        self.leaving: asyncio.Future[None] | None = None
        """Done once the engine has let go of the request, if it was aborted; else None."""
        self.usage: Usage | None = None
        """From the last output that arrived, read or not; of an aborted request, what was computed; None before."""
        self.finish_reasons: list[str] = []
        """Of the choices that have ended so far."""
        self.error: VerbatimError | None = None
        """What ended the request early; None if nothing did."""
        self.on_news: Callable[[], None] | None = None
        """Called whenever an output has arrived or the stream has ended."""
        self.on_output: Callable[[RequestOutput], None] | None = None
        """Called with every output when it arrives, read or not, and also once the request was aborted."""

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._outputs.popleft()

    def ready(self) -> list[RequestOutput]:
        """Return what has arrived and was not read yet, without waiting. For readers slower than the engine."""
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs

    async def let_go(self) -> None:
        """Wait until the engine computes nothing more for this request; then `usage` is the last word."""
        if self.leaving is not None:
            await asyncio.shield(self.leaving)

    def note(self, output: RequestOutput) -> None:
        """Note usage, error and ends of an output, whether or not it is read."""
        self.usage, self.error = output.usage, output.error
        self.finish_reasons += [delta.finish_reason for delta in output.deltas if delta.finish_reason]
        if self.on_output is not None:
            self.on_output(output)

    def deliver(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self.note(output)
        self._ended = self._ended or output.finished
        self._wake()

    def end(self) -> None:
        """End the stream: nothing more will arrive."""
        self._ended = True
        self._wake()

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive."""
        return self._ended

    def _wake(self) -> None:
        if self.on_news is not None:
            self.on_news()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class JoinedStreams(AsyncIterator[RequestOutput]):
    """Yields the outputs of one or several requests as those of one, in the order in which they arrive.

    Each output keeps its own request's id. Choices are numbered across the requests: choice c of request r is number
    `r * n + c`. Only the last output is `finished`, and its usage is that of all requests. An error of one ends all.

    For one reader, on the event loop that submitted the requests.
    """

    def __init__(self, streams: Sequence[RequestStream], n: int) -> None:
        """`n`: choices of each request."""
        self._streams = streams
        self._n = n
        self._usages = [Usage(0, 0)] * len(streams)
        self._unfinished = len(streams)
        self._failed = False
        self._arrived: deque[int] = deque()
        self._news = asyncio.Event()
        self._outputs: deque[RequestOutput] = deque()
        for number, stream in enumerate(streams):
            stream.on_news = functools.partial(self._note, number)
            self._note(number)  # it may have come before

    def __aiter__(self) -> JoinedStreams:
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            self._collect()
            if self._outputs:
                return self._outputs.popleft()
            if all(stream.ended for stream in self._streams):
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    def ready(self) -> list[RequestOutput]:
        """Return what has arrived and was not read yet, without waiting. For readers slower than the engine."""
        self._collect()
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs

    def _note(self, number: int) -> None:
        self._arrived.append(number)
        self._news.set()

    def _collect(self) -> None:
        while self._arrived:
            number = self._arrived.popleft()
            for output in self._streams[number].ready():
                if not self._failed:
                    self._outputs.append(self._joined(number, output))
                    self._failed = output.error is not None

    def _joined(self, number: int, output: RequestOutput) -> RequestOutput:
        if len(self._streams) == 1:
            return output
        self._usages[number] = output.usage
        self._unfinished -= output.finished
        base, finished = number * self._n, not self._unfinished or output.error is not None
        return dataclasses.replace(
            output,
            deltas=tuple(dataclasses.replace(delta, index=base + delta.index) for delta in output.deltas),
            usage=functools.reduce(operator.add, self._usages) if finished else output.usage,
            finished=finished,
        )

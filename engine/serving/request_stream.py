"""`RequestStream`: the outputs of one request, on the event loop that submitted it. Knows no engine and no thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from engine.errors import VerbatimError
from engine.types.outputs import RequestOutput, Usage

__all__ = ["RequestStream"]


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

    def deliver(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self.note(output)
        self._ended = self._ended or output.finished
        self._wake()

    def end(self) -> None:
        """End the stream: nothing more will arrive."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

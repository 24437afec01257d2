"""Answers the lines of a batch: many at once, and in the order of the lines.

    input ──▶ window of tasks ──▶ the first one is done ──▶ output
                    └──▶ post to the application

The window bounds what is held: answers that wait for an earlier one, and the lines they belong to. What depends on the
load never becomes an answer: a request for which there was no memory or no place is run again, alone.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp

from engine import NumericalFault, OutOfMemory
from server.api.admission import Identity
from server.batch.client import post
from server.batch.input import InputFile
from server.batch.lines import Answer, BatchLine, Refusal, digest_of, line_id, output_line

__all__ = ["TEMPLATE_CLOCK", "AnsweredLine", "Batch", "Stopped"]

TEMPLATE_CLOCK: Final = dt.datetime(2026, 1, 1)
"""What a template that prints the time reads in a batch, unless the entry pins it: a date that no model finds odd."""

_DEPTH: Final = 8
"""Lines in the window for each request that runs: so many may have finished behind one that takes long."""


class Stopped(Exception):
    """The run cannot go on. What is written stays, and another run goes on behind it."""


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """A line of the output, with its line break. `good`: it is an answer with status 200.

    `position`: where the input stood behind its line, in bytes.
    """

    data: bytes
    good: bool
    position: int


class Batch:
    """Answers lines through an application. Belongs to one event loop.

    Args:
        fingerprints: by model id, what answers depend on beside their lines.
        concurrency: requests that are under way at once.
        receipts: whether each answer is asked to hold a receipt.
    """

    def __init__(
        self, app: ASGIApp, fingerprints: Mapping[str, str], *, concurrency: int, receipts: bool = False
    ) -> None:
        self._app = app
        self._fingerprints = fingerprints
        self._concurrency = concurrency
        self._receipts = receipts
        self._places = asyncio.Semaphore(concurrency)
        self._alone = asyncio.Lock()

    def id_of(self, line: BatchLine | Refusal) -> str:
        """Return the id of a line's answer."""
        return line_id(self._digest_of(line))

    def _digest_of(self, line: BatchLine | Refusal) -> str:
        model = line.model if isinstance(line, BatchLine) else ""
        return digest_of(line, self._fingerprints.get(model, ""), receipts=self._receipts)

    async def answers(self, source: InputFile) -> AsyncGenerator[AnsweredLine, None]:
        """Answer the lines that are left in the input, in their order.

        Raises:
            Stopped: the engine has ended.
        """
        window: deque[asyncio.Task[AnsweredLine]] = deque()
        try:
            for line in source:
                window.append(asyncio.create_task(self._line(line, source.position)))
                while len(window) >= self._concurrency * _DEPTH or (window and window[0].done()):
                    yield await window.popleft()
            while window:
                yield await window.popleft()
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def _line(self, line: BatchLine | Refusal, position: int) -> AnsweredLine:
        digest = self._digest_of(line)
        if isinstance(line, Refusal):
            return AnsweredLine(output_line(line, digest, None), False, position)
        answer = await self._answer(line, Identity(digest, 0, TEMPLATE_CLOCK))
        return AnsweredLine(output_line(line, digest, answer), answer.status == 200, position)

    async def _answer(self, line: BatchLine, identity: Identity) -> Answer:
        body = line.sent(receipts=self._receipts)
        async with self._places:
            answer = await post(self._app, line.url, body, identity)
        if answer.status != 503 or _code(answer) == NumericalFault.code:
            return answer
        async with self._alone:
            taken = 0
            try:
                for _ in range(self._concurrency):
                    await self._places.acquire()
                    taken += 1
                answer = await post(self._app, line.url, body, identity)
            finally:
                for _ in range(taken):
                    self._places.release()
        if answer.status == 503 and _code(answer) not in (NumericalFault.code, OutOfMemory.code):
            raise Stopped(answer.body["error"]["message"])
        return answer


def _code(answer: Answer) -> str:
    return str(answer.body["error"]["code"])

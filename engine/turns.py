"""A lock whose waiters take turns by group. For one event loop; knows nothing of what it guards."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Turns"]


class Turns:
    """One holder at a time; then one of the next group that waits, within a group in order of arrival."""

    def __init__(self) -> None:
        self._held = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # groups in the order of their next turns

    @asynccontextmanager
    async def turn(self, group: str) -> AsyncIterator[None]:
        """Wait for a turn and keep it until the block ends."""
        if self._held:
            await self._wait(group)
        self._held = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, group: str) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._pass_on()  # it was this one's turn already
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            group = next(iter(self._waiting))
            waiting = self._waiting.pop(group)
            first = waiting.popleft()
            if waiting:
                self._waiting[group] = waiting  # at the end
            if not first.done():  # else it was given up
                first.set_result(None)
                return
        self._held = False

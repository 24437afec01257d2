"""`FairLock`: a semaphore granted round-robin across groups, first come first served within a group.

For one event loop. Knows nothing of what it guards.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque

__all__ = ["FairLock"]


class FairLock:
    """Grants a few places, round-robin across the groups that wait, first come first served within a group.

    If there are several places, a named group never holds all of them: one is left for the others, however much it
    asks for. The group "" has no such limit.
    """

    def __init__(self, places: int = 1) -> None:
        self._free = places
        self._most = max(1, places - 1)  # places that a named group may hold
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # groups, the next to be served first

    async def take(self, group: str) -> None:
        """Wait for a place. Whoever takes one must give it back."""
        if not self._may(group) or group in self._waiting:
            await self._wait(group)
        else:
            self._hold(group)

    def give_back(self, group: str) -> None:
        """Free a place that this group has taken."""
        self._held[group] -= 1
        if not self._held[group]:
            del self._held[group]
        self._free += 1
        self._pass_on()

    def _may(self, group: str) -> bool:
        return self._free > 0 and (not group or self._held[group] < self._most)

    def _hold(self, group: str) -> None:
        self._free -= 1
        self._held[group] += 1

    async def _wait(self, group: str) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give_back(group)  # the place had been granted already
            raise

    def _pass_on(self) -> None:
        for group in list(self._waiting):
            waiting = self._waiting[group]
            while waiting and waiting[0].done():  # given up
                waiting.popleft()
            if waiting and self._may(group):
                first = waiting.popleft()
                self._hold(group)
                first.set_result(None)
                del self._waiting[group]
                if waiting:
                    self._waiting[group] = waiting  # at the end
            elif not waiting:
                del self._waiting[group]
            if not self._free:
                return

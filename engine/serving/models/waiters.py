"""`Waiters`: coroutines that wait until something is true which other threads bring about."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

__all__ = ["Waiters"]


class Waiters:
    """Futures of any event loops, each with a condition. The caller guards every method with one lock."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}

    def add(self, condition: Callable[[], bool]) -> asyncio.Future[None]:
        """Return a future of the running event loop that is done once `wake` finds the condition true."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = condition
        return future

    def forget(self, future: asyncio.Future[None]) -> None:
        """Nobody waits for this one any more."""
        self._waiting.pop(future, None)

    def wake(self, *, everybody: bool = False) -> None:
        """Wake those whose condition is true, or all. From any thread."""
        for future, condition in list(self._waiting.items()):
            if everybody or condition():
                del self._waiting[future]
                with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
                    future.get_loop().call_soon_threadsafe(_finish, future)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

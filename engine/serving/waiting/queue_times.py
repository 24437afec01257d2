"""`QueueTimes`: how long each request waits until something of it is computed. Has no clock: whoever asks has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from engine.types.outputs import RequestOutput

__all__ = ["QueueTimes"]


class QueueTimes:
    """The waiting times of one engine's requests, in seconds, from their arrival to the beginning of their first step.

    A request is known from `arrive` until its first output, or until it is forgotten.
    """

    def __init__(self) -> None:
        self._arrived: dict[str, float] = {}  # of requests of which nothing is computed yet
        self._waited: dict[str, float] = {}  # of those that have begun, and have no output yet

    def arrive(self, name: str, now: float) -> None:
        """Note that a request was queued."""
        self._arrived[name] = now

    def forget(self, name: str) -> None:
        """Drop a request that was aborted."""
        self._arrived.pop(name, None)
        self._waited.pop(name, None)

    def begin(self, began: float, queued: Callable[[], Iterable[str]]) -> None:
        """Note which requests a step has taken up. `began`: when it began; `queued`: lists those that still wait."""
        if not self._arrived:
            return
        still = set(queued())
        for name in [name for name in self._arrived if name not in still]:
            self._waited[name] = max(0.0, began - self._arrived.pop(name))

    def late(self, now: float, limit: float) -> list[str]:
        """Drop and return the requests that have waited for longer than `limit`."""
        late = [name for name, since in self._arrived.items() if now - since > limit]
        for name in late:
            del self._arrived[name]
        return late

    def told(self, outputs: Sequence[RequestOutput]) -> list[RequestOutput]:
        """Return a step's outputs, with the waiting time on each that is its request's first."""
        if not self._waited:
            return list(outputs)
        times = [self._waited.pop(output.request_id, None) for output in outputs]
        return [
            output if waited is None else replace(output, queued_seconds=waited)
            for output, waited in zip(outputs, times, strict=True)
        ]

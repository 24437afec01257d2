"""`Histogram` and `Throughput`: what is observed often, kept in a few numbers. Used on one thread; have no clock."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

__all__ = ["LATENCY", "PER_TOKEN", "WINDOW", "Histogram", "Throughput"]

LATENCY: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
    1280.0, 2560.0,
)  # fmt: skip
"""Bounds in seconds for what takes from a step of a small model on a GPU to a long reply on a busy CPU."""
PER_TOKEN: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Bounds in seconds for the time of one token."""
WINDOW: Final = 5
"""Seconds over which a throughput is taken."""


class Histogram:
    """Counts observations by their size.

    Attributes:
        bounds: the upper bounds of the buckets, rising; an observation equal to a bound is in that bucket.
        total: the sum of all observations.
        count: how many there were.
    """

    __slots__ = ("_counts", "bounds", "count", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0
        self.count = 0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value
        self.count += 1

    def cumulative(self) -> list[int]:
        """Return for each bound how many observations were at most that; at last how many there were."""
        return list(accumulate(self._counts))


class Throughput:
    """How many tokens came in each of the last seconds."""

    __slots__ = ("_counts", "_seconds")

    def __init__(self) -> None:
        self._seconds = [-1] * (WINDOW + 1)
        self._counts = [0] * (WINDOW + 1)

    def add(self, now: float, tokens: int) -> None:
        """Note tokens. `now`: seconds, which never fall."""
        second = int(now)
        slot = second % (WINDOW + 1)
        if self._seconds[slot] != second:
            self._seconds[slot], self._counts[slot] = second, 0
        self._counts[slot] += tokens

    def per_second(self, now: float) -> float:
        """Return the mean of the last `WINDOW` whole seconds, the second that is under way left out."""
        this = int(now)
        found = zip(self._seconds, self._counts, strict=True)
        return sum(count for second, count in found if this - WINDOW <= second < this) / WINDOW

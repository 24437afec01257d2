"""The rate limits of keys: requests and tokens in a minute, counted over a moving window. Knows no ledger, no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.errors import RateLimited
from server.ledger.records import Key

__all__ = ["RateLimits"]


class RateLimits:
    """Counts what each key takes in a minute. `clock`: Unix seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows = MovingWindowRateLimiter(MemoryStorage())
        self._epoch = time.time() - time.monotonic()  # noqa: TID251  the windows go by the wall clock

    def count_request(self, key: Key) -> None:
        """Count a request, or raise `RateLimited` if it is one too many."""
        self._count(key, "requests", key.limits.requests_per_minute, 1)

    def count_prompt(self, key: Key, tokens: int) -> None:
        """Count the tokens of a prompt, or raise `RateLimited` if they are too many."""
        self._count(key, "tokens", key.limits.tokens_per_minute, tokens)

    def count_reply(self, key: Key, tokens: int) -> None:
        """Count the tokens of a reply, as far as the minute has room for them: they were generated already."""
        limit = key.limits.tokens_per_minute
        if limit is None or not tokens:
            return
        item = RateLimitItemPerMinute(limit)
        left = self._windows.get_window_stats(item, key.id, "tokens").remaining
        if left > 0:
            self._windows.hit(item, key.id, "tokens", cost=min(left, tokens))

    def headers(self, key: Key) -> dict[str, str]:
        """Return what is left of the key's minute, in headers as OpenAI names them."""
        found = {}
        for kind, limit in (("requests", key.limits.requests_per_minute), ("tokens", key.limits.tokens_per_minute)):
            if limit is not None:
                window = self._windows.get_window_stats(RateLimitItemPerMinute(limit), key.id, kind)
                found[f"x-ratelimit-limit-{kind}"] = str(limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(window.remaining)
                found[f"x-ratelimit-reset-{kind}"] = f"{max(0.0, window.reset_time - self._clock()):.0f}s"
        return found

    def _count(self, key: Key, kind: str, limit: int | None, cost: int) -> None:
        if limit is None:
            return
        epoch = time.time() - time.monotonic()  # noqa: TID251
        if epoch < self._epoch - 1:  # the clock was set back: what came before it would stay for as long
            self._windows.storage.reset()
        self._epoch = epoch
        item = RateLimitItemPerMinute(limit)
        if self._windows.hit(item, key.id, kind, cost=cost):
            return
        window = self._windows.get_window_stats(item, key.id, kind)
        wait = max(1, round(window.reset_time - self._clock()))
        if cost > limit:
            raise RateLimited(
                f"this request takes {cost} {kind}; the key {key.name!r} may take {limit} in a minute.",
                retry_after=wait,
                hopeless=True,
            )
        raise RateLimited(
            f"the key {key.name!r} may take {limit} {kind} in a minute; {window.remaining} are left, and this request "
            f"takes {cost}.",
            retry_after=wait,
        )

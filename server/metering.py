"""What a key may do and what a request costs it, from first to last. Knows the ledger and the limits; no HTTP.

    authenticate ─▶ admit (429, 402) ─▶ admit its prompt (429) ─▶ hold its worst case (402) ─▶ it runs ─▶ settle

The ledger is asked on a thread of its own: a disk that is slow must not hold the event loop. What was held is settled
whatever the end is, with what the engine has computed by then: a client that leaves is charged for it, once the engine
has let go of its request. What cannot be written is `server/settling.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from engine import ContextLengthExceeded, ModelNotFound, PreparedRequest, RequestStream
from server.errors import RateLimited
from server.ledger import Key, Ledger, NoBalance, Prices, Settled, cost_of
from server.settling import Settler

__all__ = ["Account", "Meter"]

_T = TypeVar("_T")


@dataclass(slots=True)
class Account:
    """Whose request it is. `outputs` is set once it runs."""

    meter: Meter
    key: Key
    model: str = ""
    fingerprint: str = ""
    outputs: RequestStream | None = None

    @asynccontextmanager
    async def charged(self, prepared: PreparedRequest, *, streamed: bool) -> AsyncIterator[None]:
        """Hold a request's worst case while it runs, and settle what it has used.

        Args:
            streamed: what was generated before a fault has reached the client, and is charged; else it is not.

        Raises:
            NoBalance: the balance does not cover it.
            RateLimited: the key runs as many requests as it may.
            LedgerFault: the database cannot be written.
        """
        async with self.meter.charge(self, prepared, streamed=streamed):
            yield


@dataclass(frozen=True, slots=True)
class _End:
    """What is known of a request when it ends, but for what the engine says."""

    account: Account
    prepared: PreparedRequest
    prices: Prices
    held: int
    started: float
    streamed: bool


class Meter:
    """Keys and limits of one server. Used on one event loop.

    Args:
        ledger: where keys and balances are.
        prices: by model; a token costs one where there is none.
        clock: Unix seconds.
        beat_seconds: how often other servers are told that this one lives; None: there are no others.
    """

    def __init__(
        self,
        ledger: Ledger,
        prices: Mapping[str, Prices],
        clock: Callable[[], float],
        beat_seconds: float | None = None,
    ) -> None:
        self._ledger = ledger
        self._prices = prices
        self._clock = clock
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._reporter = ThreadPoolExecutor(1, thread_name_prefix="reports")  # whose sums may take long
        self._windows = MovingWindowRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()
        self._settler = Settler(ledger)
        self._ends: set[asyncio.Task[None]] = set()  # of requests whose end is not with the ledger yet
        self._closed = threading.Event()
        if beat_seconds is not None:
            self._settler.beat()
            threading.Thread(target=self._beats, args=(beat_seconds,), name="beat", daemon=True).start()

    async def drain(self) -> None:
        """Wait until every request has handed in its end, at most five seconds: they are over, or were cancelled."""
        for _ in range(500):
            if not self._running and not self._ends:
                return
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Write what is still to be written, and give the database back. Safe to call twice."""
        self._closed.set()
        try:
            self._worker.submit(self._settler.close).result()
        except RuntimeError:  # closed before
            return
        self._worker.shutdown()
        self._reporter.shutdown()
        self._ledger.close()

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the ledger could be used when it was last asked, and what of that anybody may know."""
        settler = self._settler
        told: dict[str, Any] = {"ledger": "ready" if settler.fault is None else "cannot be used; see the log"}
        if settler.waiting:
            told["settlements_waiting"] = settler.waiting
        if settler.aside:
            told["settlements_set_aside"] = settler.aside
        return settler.fault is None, told

    async def authenticate(self, secret: str) -> Key | None:
        """The key that a secret opens.

        Raises:
            LedgerFault: the database cannot be read.
        """
        return await self._ask(self._settler.ask, self._ledger.authenticate, secret)

    async def usage(self, key: Key, since: float | None, by: str | None) -> list[dict[str, Any]]:
        """The key's own sums."""
        work = functools.partial(self._ledger.usage, key_id=key.id, since=since, by=by)
        return await asyncio.get_running_loop().run_in_executor(self._reporter, work)

    def admit(self, key: Key) -> None:
        """Count a request.

        Raises:
            RateLimited: it is one too many in a minute.
            NoBalance: there is nothing left to pay any request with.
        """
        self._count(key, "requests", key.limits.requests_per_minute, 1)
        if key.balance is not None and key.balance - key.held <= 0:
            raise NoBalance(f"the key {key.name!r} has {key.balance - key.held} left.", available=0, needed=1)

    def check_model(self, key: Key, model: str) -> None:
        """Raise `ModelNotFound` for a model that this key may not use: to it there is no such model."""
        if key.models and model not in key.models:
            known = ", ".join(key.models)
            raise ModelNotFound(f"the model {model[:200]!r} does not exist; there is: {known}.", param="model")

    def admit_prompt(self, key: Key, prepared: PreparedRequest) -> PreparedRequest:
        """Count a prompt's tokens, and cut the reply's length to the key's context.

        Raises:
            RateLimited: they are too many in a minute.
            ContextLengthExceeded: the prompt is longer than this key may send.
        """
        prompt, context = len(prepared.prompt_token_ids), key.limits.context
        if context is not None:
            if prompt >= context:
                raise ContextLengthExceeded(
                    f"the prompt has {prompt} tokens; this key's context holds {context}, one of them for the answer.",
                    param="messages",
                    prompt_tokens=prompt,
                    context_length=context,
                )
            most = min(prepared.params.max_tokens or context, context - prompt)
            params = dataclasses.replace(
                prepared.params, max_tokens=most, min_tokens=min(prepared.params.min_tokens, most)
            )
            prepared = dataclasses.replace(prepared, params=params)
        self._count(key, "tokens", key.limits.tokens_per_minute, prompt)
        return prepared

    def headers(self, key: Key) -> dict[str, str]:
        """What is left of the key's minute, as OpenAI names it."""
        found = {}
        for kind, limit in (("requests", key.limits.requests_per_minute), ("tokens", key.limits.tokens_per_minute)):
            if limit is not None:
                window = self._windows.get_window_stats(RateLimitItemPerMinute(limit), key.id, kind)
                found[f"x-ratelimit-limit-{kind}"] = str(limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(window.remaining)
                found[f"x-ratelimit-reset-{kind}"] = f"{max(0.0, window.reset_time - self._clock()):.0f}s"
        return found

    @asynccontextmanager
    async def charge(self, account: Account, prepared: PreparedRequest, *, streamed: bool) -> AsyncIterator[None]:
        """See `Account.charged`."""
        key = account.key
        limit = key.limits.concurrent
        if limit is not None and self._running[key.id] >= limit:
            raise RateLimited(
                f"the key {key.name!r} may run {limit} requests at once, and runs as many.", retry_after=1
            )
        prices = self._prices.get(account.model, Prices())
        prompt, most = len(prepared.prompt_token_ids), prepared.params.n * (prepared.params.max_tokens or 0)
        worst = prompt * max(prices.prompt, prices.cached_prompt) + most * prices.completion
        started = self._clock()
        self._running[key.id] += 1
        try:
            held = await self._held(key.id, prepared.request_id, worst)
            try:
                yield
            finally:
                # Not given up with the request: a client that goes away must not leave its hold behind.
                end = _End(account, prepared, prices, held, started, streamed)
                task = asyncio.ensure_future(self._hand_in(end))
                self._ends.add(task)
                task.add_done_callback(self._ends.discard)
                await asyncio.shield(task)
        finally:
            self._running[key.id] -= 1
            if not self._running[key.id]:
                del self._running[key.id]

    # -- the parts; those that ask the ledger run on its thread --------------------------------------------------------

    async def _ask(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    async def _held(self, key_id: str, request_id: str, amount: int) -> int:
        """Hold, or, if this is given up while the database is written, release what was held."""
        hold = asyncio.ensure_future(self._ask(self._settler.hold, key_id, request_id, amount))
        try:
            return await asyncio.shield(hold)
        except asyncio.CancelledError:
            await asyncio.wait({hold})
            if hold.exception() is None:
                await self._ask(self._settler.release, key_id, request_id)
            raise

    async def _hand_in(self, end: _End) -> None:
        """Wait until the engine has let go of a request, which says what it has computed, and settle it."""
        try:
            if end.account.outputs is not None:
                await end.account.outputs.let_go()
        finally:
            await self._ask(self._end, end)

    def _beats(self, seconds: float) -> None:
        """On a thread of its own, which only tells the ledger's."""
        while not self._closed.wait(seconds):
            with contextlib.suppress(RuntimeError):  # closed a moment ago
                self._worker.submit(self._settler.beat).result()

    def _count(self, key: Key, kind: str, limit: int | None, cost: int) -> None:
        if limit is None:
            return
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

    def _end(self, end: _End) -> None:
        key, prepared, outputs = end.account.key, end.prepared, end.account.outputs
        usage = outputs.usage if outputs is not None else None
        if outputs is None or usage is None or not usage.total_tokens:
            self._settler.release(key.id, prepared.request_id)
            return
        if outputs.error is not None and not (end.streamed and usage.completion_tokens):
            self._settler.release(key.id, prepared.request_id)  # nothing of it has reached the client
            return
        limit = key.limits.tokens_per_minute
        if limit is not None and usage.completion_tokens:
            item = RateLimitItemPerMinute(limit)
            left = self._windows.get_window_stats(item, key.id, "tokens").remaining
            if left > 0:
                self._windows.hit(item, key.id, "tokens", cost=min(left, usage.completion_tokens))
        reasons = [*outputs.finish_reasons]
        if len(reasons) < prepared.params.n:
            reasons.append("error" if outputs.error else "disconnected")
        assert prepared.params.seed is not None
        self._settler.settle(
            Settled(
                request_id=prepared.request_id,
                key_id=key.id,
                model=end.account.model,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                reasoning_tokens=usage.reasoning_tokens,
                cost=min(cost_of(usage, end.prices), end.held),
                seed=prepared.params.seed,
                fingerprint=end.account.fingerprint,
                finish_reason=",".join(reasons),
                started=end.started,
                ended=self._clock(),
            )
        )

"""What a key may do and what a request costs it, from first to last. Knows the ledger and the limits; no HTTP.

    authenticate ─▶ admit (429, 402) ─▶ admit its prompt (429) ─▶ hold its worst case (402) ─▶ it runs ─▶ settle

The ledger is asked on a thread of its own: a disk that is slow must not hold the event loop. What was held is settled
whatever the end is, with what the engine has computed by then: a client that leaves is charged for it, once the engine
has let go of its request. What cannot be written is `server/accounts/settling.py`'s.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from engine import ContextLengthExceeded, FairLock, ModelNotFound, PreparedRequest, RequestError, RequestStream
from server.accounts.settling import Settler
from server.errors import ClientGone, RateLimited
from server.ledger.store import Key, Ledger, LedgerFault, NoBalance, Prices, Settled, cost_of

__all__ = ["Account", "Meter"]

log = logging.getLogger("verbatim.server")

_T = TypeVar("_T")

_PATIENCE: Final = 15.0
"""Seconds in which the ledger has to answer before a request runs: more than it waits for locks and connections itself.
A disk or a host that hangs has no end of its own."""


@dataclass(slots=True)
class Account:
    """Whose request it is. `outputs` is set once it runs, `told` once something of the reply has been sent."""

    meter: Meter
    key: Key
    model: str = ""
    fingerprint: str = ""
    outputs: RequestStream | None = None
    told: bool = False

    @asynccontextmanager
    async def charged(self, prepared: PreparedRequest) -> AsyncIterator[None]:
        """Hold a request's worst case while it runs, and settle what was computed for it.

        A fault of the server costs nothing, unless what was generated before it has been sent. What ends a request by
        its own fault (a `RequestError`: its grammar cannot be followed) costs what was computed, or whoever makes
        requests that fail at the last token has the engine for nothing.

        Raises:
            NoBalance: the balance does not cover it.
            RateLimited: the key runs as many requests as it may.
            LedgerFault: the database cannot be written.
        """
        async with self.meter.charge(self, prepared):
            yield


@dataclass(frozen=True, slots=True)
class _End:
    """What is known of a request when it ends, but for what the engine says."""

    account: Account
    prepared: PreparedRequest
    prices: Prices
    held: int
    started: float
    failed: Exception | None
    """What its answer failed with, if it was not the client's leaving."""


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
        self._reports = FairLock()  # of keys: one that asks for many has others' between its own
        self._windows = MovingWindowRateLimiter(MemoryStorage())
        self._epoch = time.time() - time.monotonic()  # noqa: TID251  the windows go by the wall clock
        self._running: Counter[str] = Counter()
        self._settler = Settler(ledger)
        self._ends: set[asyncio.Task[None]] = set()  # of requests whose end is not with the ledger yet
        self._hangs = False  # whether the ledger was last seen not to answer
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
        good = settler.fault is None and not self._hangs
        told: dict[str, Any] = {"ledger": "ready" if good else "cannot be used; see the log"}
        if settler.waiting:
            told["settlements_waiting"] = settler.waiting
        if settler.aside:
            told["settlements_set_aside"] = settler.aside
        return good, told

    async def authenticate(self, secret: str) -> Key | None:
        """The key that a secret opens.

        Raises:
            LedgerFault: the database cannot be read.
        """
        try:
            return await asyncio.wait_for(self._ask(self._settler.ask, self._ledger.authenticate, secret), _PATIENCE)
        except TimeoutError:
            raise self._hung() from None

    async def usage(self, key: Key, since: float | None, by: str | None) -> list[dict[str, Any]]:
        """The key's own sums."""
        work = functools.partial(self._ledger.usage, key_id=key.id, since=since, by=by)
        await self._reports.take(key.id)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reporter, work)
        except LedgerFault as error:
            log.error("a report of usage could not be made: %s", error.message)
            raise
        finally:
            self._reports.give_back(key.id)

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
    async def charge(self, account: Account, prepared: PreparedRequest) -> AsyncIterator[None]:
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
            failed: Exception | None = None
            try:
                yield
            except Exception as error:
                failed = error
                raise
            finally:
                end = _End(account, prepared, prices, held, started, failed)
                await asyncio.shield(self._keep(self._hand_in(end)))
        finally:
            self._running[key.id] -= 1
            if not self._running[key.id]:
                del self._running[key.id]

    # -- the parts; those that ask the ledger run on its thread --------------------------------------------------------

    async def _ask(self, function: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)
        finally:
            self._hangs = False  # whatever it said; one that is given up on is marked after this

    async def _held(self, key_id: str, request_id: str, amount: int) -> int:
        """Hold, or, if this is given up while the database is written, release what was held."""
        hold = asyncio.ensure_future(self._ask(self._settler.hold, key_id, request_id, amount))
        try:
            return await asyncio.wait_for(asyncio.shield(hold), _PATIENCE)
        except TimeoutError:
            self._keep(self._take_back(hold, key_id, request_id))
            raise self._hung() from None
        except asyncio.CancelledError:
            await asyncio.shield(self._keep(self._take_back(hold, key_id, request_id)))
            raise

    def _hung(self) -> LedgerFault:
        if not self._hangs:
            log.critical("the ledger has not answered for %g seconds; requests are refused until it does", _PATIENCE)
        self._hangs = True
        return LedgerFault("the ledger does not answer.")

    async def _take_back(self, hold: asyncio.Future[int], key_id: str, request_id: str) -> None:
        await asyncio.wait({hold})
        if hold.exception() is None:
            await self._ask(self._settler.release, key_id, request_id)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work that is not given up with its request: a client that goes away must not leave its hold behind."""
        task = asyncio.ensure_future(work)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task

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
            try:
                self._worker.submit(self._settler.beat).result()
            except Exception:  # a server that beats no more is taken for dead
                if not self._closed.is_set():
                    log.exception("a beat failed; there is another")

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

    def _end(self, end: _End) -> None:
        key, prepared, outputs = end.account.key, end.prepared, end.account.outputs
        usage = outputs.usage if outputs is not None else None
        if outputs is None or usage is None or not usage.total_tokens:
            self._settler.release(key.id, prepared.request_id)
            return
        fault = outputs.error or end.failed
        served = end.account.told and usage.completion_tokens
        if fault is not None and not isinstance(fault, RequestError | ClientGone) and not served:
            self._settler.release(key.id, prepared.request_id)
            return
        limit = key.limits.tokens_per_minute
        if limit is not None and usage.completion_tokens:
            item = RateLimitItemPerMinute(limit)
            left = self._windows.get_window_stats(item, key.id, "tokens").remaining
            if left > 0:
                self._windows.hit(item, key.id, "tokens", cost=min(left, usage.completion_tokens))
        reasons = [*outputs.finish_reasons]
        if len(reasons) < prepared.params.n:
            reasons.append("error" if fault and not isinstance(fault, ClientGone) else "disconnected")
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

"""Charges keys for requests, from the first byte to the last. Knows the ledger and the limits; no HTTP.

    authenticate ─▶ admit (429, 402) ─▶ hold the worst case (402) ─▶ the request runs ─▶ settle

The ledger is called on a thread of its own, because a slow disk must not block the event loop. However a request ends,
its hold is settled with what the engine has computed for it by then: a client that leaves is charged, once the engine
has dropped its request. `server/accounts/settling.py` keeps what cannot be written yet.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import operator
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from engine import FairLock, ModelInfo, PreparedRequest, RequestError, RequestStream, Usage
from server.accounts.limits import RateLimits
from server.accounts.settling import Settler
from server.errors import ClientGone, RateLimited
from server.ledger.records import Key, LedgerFault, NoBalance, Prices, Settled, cost_of
from server.ledger.store import Ledger

__all__ = ["Charge", "LedgerState", "Meter"]

log = logging.getLogger("verbatim.server")

_T = TypeVar("_T")

_PATIENCE: Final = 15.0
"""Seconds in which the ledger must answer before a request runs: more than it waits itself for locks and connections.
Without this, a disk or a host that hangs would hold requests for ever."""


_LISTED: Final = 64
"""Choices whose finish reasons are recorded one by one."""


@dataclass(slots=True)
class Charge:
    """What a reply that is being made will be charged for.

    Attributes:
        requests: those of the engine that it is made of. The ledger knows them by the id of the first.
        held: the amount set aside for them.
        started: Unix seconds.
        outputs: the engine's answers to those that were submitted.
        sent: whether a part of the reply has reached the client.
        failed: the error that ended the answer; None also where the client left.
    """

    key: Key
    requests: Sequence[PreparedRequest]
    model: ModelInfo
    prices: Prices
    held: int
    started: float
    outputs: list[RequestStream] = field(default_factory=list)
    sent: bool = False
    failed: Exception | None = None

    @property
    def request_id(self) -> str:
        return self.requests[0].request_id


@dataclass(frozen=True, slots=True)
class LedgerState:
    """How the ledger does, as far as is known without asking it.

    Attributes:
        usable: whether it could be used when it was last asked.
        faults: calls of it that failed because it could not be used.
        waiting: requests that have ended and are not written yet.
        aside: settlements that it refused and nobody has seen.
    """

    usable: bool
    faults: int
    waiting: int
    aside: int


class Meter:
    """Charges the keys of one server: admits requests, holds their worst case, settles what they used.

    Used on one event loop.

    Args:
        ledger: stores keys, balances and requests.
        prices: by model; a token of a model that is not there costs one.
        clock: Unix seconds.
        beat_seconds: the interval at which other servers are told that this one is alive; None: there are no others.

    Attributes:
        limits: counts the requests and tokens of each key's minute.
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
        self._reporter = ThreadPoolExecutor(1, thread_name_prefix="reports")  # sums over a long history take long
        self._reports = FairLock()  # reports are made round-robin across keys
        self.limits = RateLimits(clock)
        self._running: Counter[str] = Counter()
        self._settler = Settler(ledger)
        self._ends: set[asyncio.Task[None]] = set()  # requests that have ended and are not settled yet
        self._hangs = False  # whether the ledger did not answer in time when it was last asked
        self._timeouts = 0  # calls of the ledger that it did not answer in time
        self._closed = threading.Event()
        if beat_seconds is not None:
            self._settler.beat()
            threading.Thread(target=self._beats, args=(beat_seconds,), name="beat", daemon=True).start()

    async def drain(self) -> None:
        """Wait until every request that has ended is handed to the ledger's thread, at most five seconds."""
        for _ in range(500):
            if not self._running and not self._ends:
                return
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Write what is still to be written and close the database. Safe to call twice."""
        self._closed.set()
        try:
            self._worker.submit(self._settler.close).result()
        except RuntimeError:  # closed before
            return
        self._worker.shutdown()
        self._reporter.shutdown()
        self._ledger.close()

    def state(self) -> LedgerState:
        """Return how the ledger does, without asking it."""
        settler = self._settler
        usable = settler.fault is None and not self._hangs
        return LedgerState(usable, settler.faults + self._timeouts, settler.waiting, settler.aside)

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Return whether the ledger could be used when it was last asked, and the public part of its state."""
        state = self.state()
        told: dict[str, Any] = {"ledger": "ready" if state.usable else "cannot be used; see the log"}
        if state.waiting:
            told["settlements_waiting"] = state.waiting
        if state.aside:
            told["settlements_set_aside"] = state.aside
        return state.usable, told

    async def authenticate(self, secret: str) -> Key | None:
        """Return the key that has this secret, or None.

        Raises:
            LedgerFault: the database cannot be read.
        """
        try:
            return await asyncio.wait_for(self._ask(self._settler.ask, self._ledger.authenticate, secret), _PATIENCE)
        except TimeoutError:
            raise self._hung() from None

    async def usage(self, key: Key, since: float | None, by: str | None) -> list[dict[str, Any]]:
        """Return the sums of what a key has used; see `Reports.usage`."""
        return await self._report(key, functools.partial(self._ledger.usage, key_id=key.id, since=since, by=by))

    async def keys(self, key: Key) -> list[tuple[Key, dict[str, int]]]:
        """Return all keys, revoked ones included, each with the sums of what it has used. `key`: who asks."""
        return await self._report(key, self._ledger.keys_and_sums)

    async def _report(self, key: Key, work: Callable[[], _T]) -> _T:
        """Ask the ledger for what may take long, on a thread of its own; keys that ask take turns."""
        await self._reports.take(key.id)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reporter, work)
        except LedgerFault as error:
            log.error("a report of usage could not be made: %s", error.message)
            raise
        finally:
            self._reports.give_back(key.id)

    def admit(self, key: Key) -> None:
        """Count a request before its body is read.

        Raises:
            RateLimited: it is one too many in a minute.
            NoBalance: nothing is left to pay any request with.
        """
        self.limits.count_request(key)
        if key.balance is not None and key.balance - key.held <= 0:
            raise NoBalance(f"the key {key.name!r} has {key.balance - key.held} left.", available=0, needed=1)

    @asynccontextmanager
    async def charge(self, key: Key, requests: Sequence[PreparedRequest], model: ModelInfo) -> AsyncIterator[Charge]:
        """Hold the worst case of a reply's requests while they run, and settle what was computed for them, as one.

        A fault of the server costs nothing, unless text generated before it was sent. An error that the request itself
        caused (a `RequestError`: its grammar cannot be followed) costs what was computed; otherwise requests that fail
        at the last token would have the engine for free.

        Raises:
            NoBalance: the balance does not cover it.
            RateLimited: more requests of the key would run than may run at once.
            LedgerFault: the database cannot be written.
        """
        self._admit_running(key, len(requests))
        # An adapter without prices of its own costs what its model does.
        base = self._prices.get(model.parent or model.id, Prices())
        prices = self._prices.get(model.id, base)
        if all(one.follow is not None for one in requests):  # a check: its reply is computed as a prompt is
            prices = dataclasses.replace(prices, completion=prices.prompt)
        prompt = sum(len(one.prompt_token_ids) for one in requests)
        most = sum(_most_generated(one) for one in requests)
        worst = prompt * max(prices.prompt, prices.cached_prompt) + most * prices.completion
        started = self._clock()
        self._running[key.id] += len(requests)
        try:
            held = await self._held(key.id, requests[0].request_id, worst)
            charge = Charge(key, requests, model, prices, held, started)
            try:
                yield charge
            except Exception as error:
                charge.failed = error
                raise
            finally:
                await asyncio.shield(self._keep(self._hand_in(charge)))
        finally:
            self._running[key.id] -= len(requests)
            if not self._running[key.id]:
                del self._running[key.id]

    def _admit_running(self, key: Key, count: int) -> None:
        limit, running = key.limits.concurrent, self._running[key.id]
        if limit is None or running + count <= limit:
            return
        if count > limit:
            raise RateLimited(
                f"this request has {count} prompts; the key {key.name!r} may run {limit} requests at once, and each "
                "prompt is one.",
                hopeless=True,
            )
        if count == 1:
            raise RateLimited(
                f"the key {key.name!r} may run {limit} requests at once, and runs as many.", retry_after=1
            )
        raise RateLimited(
            f"the key {key.name!r} may run {limit} requests at once, and runs {running}; this one has {count} prompts, "
            "each of which is one.",
            retry_after=1,
        )

    # -- calls of the ledger, on its thread ------------------------------------------------------------------------

    async def _ask(self, function: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)
        finally:
            self._hangs = False  # it answered; a call that timed out sets this again afterwards

    async def _held(self, key_id: str, request_id: str, amount: int) -> int:
        """Hold an amount. If this call times out or is cancelled, release the hold once it was written."""
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
        self._timeouts += 1
        return LedgerFault("the ledger does not answer.")

    async def _take_back(self, hold: asyncio.Future[int], key_id: str, request_id: str) -> None:
        await asyncio.wait({hold})
        if hold.exception() is None:
            await self._ask(self._settler.release, key_id, request_id)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work that outlives its request: a client that leaves must not leave its hold behind."""
        task = asyncio.ensure_future(work)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task

    async def _hand_in(self, charge: Charge) -> None:
        """Settle a charge once the engine has dropped the request, and so knows what it has computed for it."""
        try:
            for outputs in charge.outputs:
                await outputs.let_go()
        finally:
            await self._ask(self._settle, charge)

    def _beats(self, seconds: float) -> None:
        """Call the settler's `beat` on the ledger's thread at every interval. Runs on a thread of its own."""
        while not self._closed.wait(seconds):
            try:
                self._worker.submit(self._settler.beat).result()
            except Exception:  # other servers would take one that stops beating for dead
                if not self._closed.is_set():
                    log.exception("a beat failed; there is another")

    def _settle(self, charge: Charge) -> None:
        """Settle a charge with what the engine has computed, or release its hold if that is free."""
        key, params = charge.key, charge.requests[0].params
        usage = functools.reduce(operator.add, (one.usage for one in charge.outputs if one.usage), Usage(0, 0))
        if not usage.total_tokens:
            self._settler.release(key.id, charge.request_id)
            return
        fault = next((one.error for one in charge.outputs if one.error), charge.failed)
        served = charge.sent and usage.completion_tokens
        if fault is not None and not isinstance(fault, RequestError | ClientGone) and not served:
            self._settler.release(key.id, charge.request_id)
            return
        self.limits.count_reply(key, usage.completion_tokens)
        reasons = [reason for one in charge.outputs for reason in one.finish_reasons]
        if len(reasons) < params.n * len(charge.requests):
            reasons.append("error" if fault and not isinstance(fault, ClientGone) else "disconnected")
        assert params.seed is not None
        self._settler.settle(
            Settled(
                request_id=charge.request_id,
                key_id=key.id,
                model=charge.model.id,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                reasoning_tokens=usage.reasoning_tokens,
                cost=min(cost_of(usage, charge.prices), charge.held),
                seed=params.seed,
                fingerprint=charge.model.system_fingerprint,
                finish_reason=_in_short(reasons),
                started=charge.started,
                ended=self._clock(),
            )
        )


def _most_generated(request: PreparedRequest) -> int:
    """Return how many tokens a request's choices may have: of a check, those of the reply that it follows."""
    if request.follow is not None:
        return sum(map(len, request.follow))
    return request.params.n * (request.params.max_tokens or 0)


def _in_short(reasons: Sequence[str]) -> str:
    """Write the finish reasons of a reply's choices: one by one, or of very many how often each occurs."""
    if len(reasons) <= _LISTED:
        return ",".join(reasons)
    return ",".join(f"{count} {reason}" for reason, count in sorted(Counter(reasons).items()))

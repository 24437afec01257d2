"""`Receipts`: makes, signs and keeps the receipts of one server. Knows no HTTP and no shape of a reply.

    begin ──▶ (the reply runs) ──▶ write: canonical form, signature ──▶ keep: folder or ledger

Everything runs on threads of its own, because canonical JSON of a long reply and a slow disk must not block the event
loop. Keeping is waited for, so that a reply that has ended has its receipt kept; but not for longer than `_PATIENCE`,
and a fault never loses the reply: it is logged when it begins and when it ends, and `health` tells it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from engine import (
    FairLock,
    GenerationRequest,
    ModelInfo,
    PreparedRequest,
    Recorder,
    sign_receipt,
)
from server.errors import KeepingFault, ReceiptNotFound
from server.json_text import to_json
from server.receipts.keeping import ANONYMOUS, Keeper, Kept, Written
from server.settings import ReceiptSettings

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

__all__ = ["Form", "Receipts"]

log = logging.getLogger("verbatim.server")

_T = TypeVar("_T")

Form = Literal["full", "digest"]
"""A receipt with the request, the tokens and the scores, or with their digests alone."""

_PATIENCE: Final = 10.0
"""Seconds that the end of a reply waits for its receipt to be kept: longer than a ledger waits for a lock."""
_MOST_WAITING: Final = 64
"""Replies whose receipts may wait for a disk or a database. Where it answers, further ones wait for their turn; where
it does not, they are not kept."""
_DAY: Final = 86_400.0


class Receipts:
    """The receipts of one server. Used on one event loop; owns its keeper and its threads.

    Attributes:
        settings: what is made, signed and kept.
    """

    def __init__(
        self,
        settings: ReceiptSettings | None = None,
        *,
        clock: Callable[[], float],
        keeper: Keeper | None = None,
        signer: CryptoSigner | None = None,
    ) -> None:
        """Start the thread that deletes old receipts, if any are to be.

        Args:
            clock: Unix seconds.
            keeper: None: nothing is kept.
            signer: None: nothing is signed.
        """
        self.settings = settings or ReceiptSettings()
        self._clock, self._keeper, self._signer = clock, keeper, signer
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="receipts")
        self._putter = ThreadPoolExecutor(1, thread_name_prefix="keep-receipts")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-receipts")
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="check-receipts")  # replies do not wait for strangers
        self._reads = FairLock()  # lists are made round-robin across owners
        self._checks = FairLock()  # so are checks
        self._waiting = 0  # replies whose receipts were handed to the putter and are not kept yet
        self._room = asyncio.Semaphore(_MOST_WAITING)
        self._lost = 0  # receipts that could not be kept
        self._faulty = False  # whether the last one could not be kept
        self._closed = threading.Event()
        if keeper is not None:
            threading.Thread(target=self._sweeps, name="sweep-receipts", daemon=True).start()

    @property
    def key(self) -> SSlibKey | None:
        """The public half of the key that signs; None if nothing is signed."""
        return None if self._signer is None else self._signer.public_key

    @property
    def keeps(self) -> bool:
        """Whether receipts are kept."""
        return self._keeper is not None

    def form(self, asked: bool | Literal["digest"]) -> Form | None:
        """Return the form of the receipt that a reply gets, sent or only kept; None if it gets none."""
        if not asked and not self.settings.always:
            return None
        return "full" if self.settings.text and asked != "digest" else "digest"

    def health(self) -> dict[str, Any]:
        """Return what is wrong with keeping; empty if nothing is."""
        state = {"receipts": "cannot be kept; see the log"} if self._faulty else {}
        return {**state, **({"receipts_not_kept": self._lost} if self._lost else {})}

    def close(self) -> None:
        """Keep what is still to be kept, and end the threads. Safe to call twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        for worker in (self._writer, self._putter, self._reader, self._checker):
            worker.shutdown()
        if self._keeper is not None:
            self._keeper.close()

    # -- making ------------------------------------------------------------------------------------------------------

    async def begin(
        self, request: GenerationRequest, prepared: PreparedRequest, info: ModelInfo, created: int, form: Form
    ) -> Recorder:
        """Begin the receipt of a request that was prepared to be recorded.

        Raises:
            ReceiptError: the request holds something that a receipt cannot.
        """
        make = functools.partial(
            Recorder, request, prepared, info, id=prepared.request_id, created=created, text=form == "full"
        )
        return await self._write(make)

    async def write(self, recorders: Sequence[Recorder]) -> list[Written]:
        """Write the receipts of a finished reply, signed if this server signs.

        Raises:
            ReceiptError: one holds what a receipt cannot.
        """
        return await self._write(lambda: [self._written(recorder) for recorder in recorders])

    async def check(self, group: str, function: Callable[[], _T]) -> _T:
        """Call a part of a check of a receipt that somebody sent, which takes longer than the event loop can wait."""
        await self._checks.take(group)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._checker, function)
        finally:
            self._checks.give_back(group)

    async def _write(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, function)

    def _written(self, recorder: Recorder) -> Written:
        receipt = recorder.receipt()
        body = receipt.to_bytes() if self._signer is None else to_json(sign_receipt(receipt, self._signer)).encode()
        return Written(receipt.id, receipt.model.name, receipt.created, body)

    # -- keeping -----------------------------------------------------------------------------------------------------

    async def keep(self, group: str, written: Sequence[Written]) -> bool:
        """Keep receipts. Returns False if they are lost, or may be: they could not be kept within `_PATIENCE`.

        `group`: the owner's key; empty on a server without keys.
        """
        if self._keeper is None:
            return True
        put = functools.partial(self._put, group or ANONYMOUS, written)
        work: asyncio.Future[None] | None = None
        try:
            async with asyncio.timeout(0.0 if self._faulty and self._waiting else _PATIENCE):
                await self._room.acquire()
                self._waiting += 1
                work = asyncio.get_running_loop().run_in_executor(self._putter, put)
                work.add_done_callback(lambda done: self._kept(done, len(written)))
                await asyncio.shield(work)
        except TimeoutError:
            if work is None:
                self._failed(len(written), f"{self._waiting} replies wait already for a disk or a database")
                return False
            if not self._faulty:
                log.error("receipts are not kept within %g seconds; replies no longer wait for it", _PATIENCE)
            self._faulty = True
            return False
        except Exception as error:
            if work is None:  # the thread has ended
                self._leave()
                self._failed(len(written), str(error))
            return False  # else told by `_kept`
        return True

    def _put(self, owner: str, written: Sequence[Written]) -> None:
        assert self._keeper is not None
        for one in written:
            self._keeper.put(owner, one)

    def _leave(self) -> None:
        self._waiting -= 1
        self._room.release()

    def _kept(self, done: asyncio.Future[None], count: int) -> None:
        self._leave()
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:
            self._failed(count, str(error) or type(error).__name__)
        elif self._faulty:
            self._faulty = False
            log.warning("receipts are kept again; %d were not", self._lost)

    def _failed(self, count: int, reason: str) -> None:
        self._lost += count
        if not self._faulty:
            log.error("receipts cannot be kept, and replies go without: %s", reason)
        self._faulty = True

    # -- finding -----------------------------------------------------------------------------------------------------

    async def find(self, group: str, id: str) -> bytes:
        """Return a receipt that is kept for this key, as it was sent.

        Raises:
            ReceiptNotFound: it has none with this id; the same where another key has.
            KeepingFault: it cannot be read.
        """
        keeper, owner = self._place(), group or ANONYMOUS
        found = await self._read(owner, lambda: keeper.get(owner, id))
        if found is None:
            raise ReceiptNotFound(f"no receipt with the id {id[:200]!r} is kept here for you.")
        return found

    async def list(self, group: str, after: str | None, most: int) -> list[Kept]:
        """List a key's receipts, newest first.

        Args:
            after: begin after the receipt with this id.

        Raises:
            ReceiptNotFound: nothing is kept here.
            KeepingFault: they cannot be read.
        """
        keeper, owner = self._place(), group or ANONYMOUS
        return await self._read(owner, lambda: keeper.list(owner, after, most))

    def _place(self) -> Keeper:
        if self._keeper is None:
            raise ReceiptNotFound(
                "this server keeps no receipts; `receipts: {keep: FOLDER}` under `server:` in its models.yaml would."
            )
        return self._keeper

    async def _read(self, owner: str, function: Callable[[], _T]) -> _T:
        await self._reads.take(owner)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, function)
        except KeepingFault as error:
            log.error("%s", error.message)
            raise
        finally:
            self._reads.give_back(owner)

    def _sweeps(self) -> None:
        """Delete old receipts at the start and once a day. Runs on a thread of its own."""
        assert self._keeper is not None
        while not self._closed.is_set():
            days = self.settings.days
            before = 0.0 if days is None else self._clock() - days * _DAY
            try:
                if dropped := self._keeper.sweep(before):
                    log.info("%d receipts older than %d days were deleted", dropped, days)
            except KeepingFault as error:
                log.error("%s", error.message)
            except Exception:
                if not self._closed.is_set():
                    log.exception("old receipts were not deleted; there is another attempt tomorrow")
            self._closed.wait(_DAY)

"""Writes holds and settlements into the ledger, and keeps them while it cannot be written.

    hold ──▶ end ──▶ waiting ──▶ written            the database works
                        │  └───▶ set aside          it can never store this row: logged, and kept as text
                        └── stays, its hold too     it cannot be used: tried again before the key's next hold,
                                                    at every beat, and at the end

A key with a waiting settlement gets no new hold, so that nothing is served for free. Other keys do not wait for it: if
another process locks the key's row (PostgreSQL), the row is tried once per beat. Used on one thread, the ledger's.
Knows a request only by its id, and has no clock: another process is alive while its count in the ledger rises from one
beat of this process to the next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Final, TypeVar

from engine import VerbatimError
from server.accounts.owners import surely_gone
from server.ledger.records import LedgerFault, Locked, Settled, Unwritable
from server.ledger.store import Ledger

__all__ = ["BEAT_SECONDS", "Settler"]

log = logging.getLogger("verbatim.server")

BEAT_SECONDS: Final = 15.0
"""The time between two beats."""
_SILENT: Final = 6
"""After this many beats without a rise of its count, another process is taken for dead. That is a minute and a half,
longer than a slow disk or a restart of the database takes."""

_T = TypeVar("_T")


class Settler:
    """Keeps the holds and settlements of one server until they are written.

    Args:
        gone: tells whether the process with an owner's name has surely ended.
    """

    def __init__(self, ledger: Ledger, gone: Callable[[str], bool] = surely_gone) -> None:
        self._ledger = ledger
        self._gone = gone
        self._waiting: dict[str, tuple[str, Settled | None]] = {}  # request id → key id, row; no row: a release
        self._locked: set[str] = set()  # ids of keys whose rows were locked in this beat
        self._silent: dict[str, tuple[int | None, int]] = {}  # owner → its count, beats without a rise
        self.fault: str | None = None
        """Why the ledger could not be used at the last call; None if it could."""
        self.faults = 0
        """Calls of the ledger that failed because it could not be used."""
        self.aside = 0
        """Settlements set aside that nobody has seen."""

    @property
    def waiting(self) -> int:
        """The number of ended requests that are not written yet."""
        return len(self._waiting)

    def ask(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Call the ledger, and note whether it could be used."""
        try:
            answer = function(*arguments)
        except (Unwritable, Locked):
            raise
        except LedgerFault as error:
            self.faults += 1
            if self.fault is None:
                log.critical("requests are refused until the ledger can be used again: %s", error.message)
            self.fault = error.message
            raise
        except VerbatimError:  # the ledger works, and refuses this
            self._works()
            raise
        self._works()
        return answer

    def hold(self, key_id: str, request_id: str, amount: int) -> int:
        """Hold a request's worst case. Returns the amount held.

        Raises:
            LedgerFault: the ledger cannot be used, or a settlement of this key is still waiting.
        """
        if key_id in self._locked:
            raise Locked("another process locks this key's row in the ledger; it is tried again within seconds.")
        self._write([name for name, (key, _) in self._waiting.items() if key == key_id])
        try:
            return self.ask(self._ledger.hold, key_id, request_id, amount)
        except LedgerFault as error:
            if isinstance(error, Locked):
                self._locked.add(key_id)
            self._waiting[request_id] = (key_id, None)  # it may have been written nevertheless
            raise

    def settle(self, row: Settled) -> None:
        """Settle a request now, or as soon as it can be written."""
        self._waiting[row.request_id] = (row.key_id, row)
        self._end(row.request_id)

    def release(self, key_id: str, request_id: str) -> None:
        """Release a hold now, or as soon as it can be written."""
        self._waiting[request_id] = (key_id, None)
        self._end(request_id)

    def beat(self) -> None:
        """Record that this process is alive, write what waits, and release the holds of processes that are gone."""
        try:
            others, self.aside = self.ask(self._ledger.beat)
            self._locked.clear()
            for request_id in list(self._waiting):  # one that fails does not stop the others
                self._end(request_id, again=True)
            for owner, beats in others.items():
                self._look_at(owner, beats)
            self._silent = {owner: seen for owner, seen in self._silent.items() if owner in others}
        except LedgerFault:
            pass  # noted in `fault`; the next beat tries again

    def close(self) -> None:
        """Write what waits, and remove this process from the ledger. What cannot be written is logged."""
        try:
            self._ledger.beat()  # fails once if the database is gone, before each waiting row would
            self._locked.clear()
            for request_id in list(self._waiting):
                self._end(request_id)
            self._ledger.leave()
        except LedgerFault as error:
            log.error("the ledger does not know that this server ends: %s", error.message)
        for key_id, row in self._waiting.values():
            log.critical("not written: %s", json.dumps(asdict(row) if row else {"release of": key_id}))

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _works(self) -> None:
        if self.fault is not None:
            log.warning("the ledger can be used again")
        self.fault = None

    def _end(self, request_id: str, *, again: bool = False) -> None:
        try:
            self._write([request_id])
        except LedgerFault as error:
            level = logging.DEBUG if again else logging.ERROR
            log.log(level, "the end of %s waits to be written, and its hold stands: %s", request_id, error.message)

    def _write(self, requests: list[str]) -> None:
        """Write these settlements. Stops with a `LedgerFault` at the first for which the ledger cannot be used."""
        for request_id in requests:
            key_id, row = self._waiting[request_id]
            if key_id in self._locked:
                raise Locked("the row of its key is locked.")
            try:
                if row is None:
                    self._ledger.release(request_id)
                elif unpaid := self._ledger.settle(row):
                    log.error("%s had lost its hold, and %d of its cost are unpaid", request_id, unpaid)
            except Unwritable as error:
                self._set_aside(request_id, row, error)
            except Locked:
                self._locked.add(key_id)
                raise
            del self._waiting[request_id]

    def _set_aside(self, request_id: str, row: Settled | None, error: Unwritable) -> None:
        text = json.dumps(asdict(row) if row else {"request_id": request_id})
        try:
            if row is None:
                raise error
            self._ledger.set_aside(row, error.message)
            log.critical("set aside, see `verbatim keys check`: %s (%s)", text, error.message)
        except Unwritable as again:
            log.critical("cannot be written, and its hold stands: %s (%s)", text, again.message)
        self.aside += 1

    def _look_at(self, owner: str, beats: int | None) -> None:
        """Release the holds of another process that has surely ended, or whose count has not risen for long."""
        last, silent = self._silent.get(owner, (beats, -1))
        silent = silent + 1 if last == beats else 0
        self._silent[owner] = (beats, silent)
        if silent >= _SILENT or self._gone(owner):
            count = self.ask(self._ledger.release_owner, owner, beats)
            if count:
                log.warning("%d holds of a server that is gone are released (%s)", count, owner.partition(":")[0])

"""Holds and settled requests: what a running request sets aside, what it has cost, and which processes hold.

    hold        sets a request's worst case aside, or refuses: balance − held never falls below zero
    settle      ends a hold with what was really used; writes one row for each request, once, hold or no hold
    set_aside   settles a request whose row the table refuses
    release     ends a hold with nothing

Each is one transaction, and taking money is one conditional UPDATE: two requests cannot spend the same balance,
whatever runs beside them, in this process or in another. Amounts are integers, in micro-credits or tokens as the prices
say. The requests of a key without a balance are recorded, not charged.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import Connection, and_, delete, func, insert, literal, select, union, update

from server.ledger.database import LedgerPart
from server.ledger.keys import key_by_id
from server.ledger.records import NoBalance, Settled, UnknownKey
from server.ledger.statements import CHARGE, DROP_HOLD, HOLD, LOCK, NOTE_HOLD, NOTE_REQUEST, STATE, TAKE
from server.ledger.tables import HOLDS, OWNERS, SET_ASIDE

__all__ = ["Holds"]

_64_BITS: Final = 2**63 - 1


class Holds(LedgerPart):
    """The ledger's verbs for requests. `owner`: names this process among those that hold."""

    owner: str

    def hold(self, key_id: str, request_id: str, amount: int) -> int:
        """Set a request's worst case aside. Returns the amount: 0 for a key that is not metered.

        Raises:
            NoBalance: the balance does not cover it.
            UnknownKey: there is no such key, or it was revoked meanwhile.
        """
        amount = min(amount, _64_BITS)  # more than any balance
        with self._database.write() as connection:
            held = connection.execute(TAKE, {"key": key_id, "amount": amount})
            key = key_by_id(connection, key_id)
            if held.rowcount != 1:
                if key.revoked is not None:
                    raise UnknownKey(f"the key {key.name!r} was revoked.")
                free = (key.balance or 0) - key.held
                raise NoBalance(
                    f"the key {key.name!r} has {free} left, and this request may cost {amount}. Ask for fewer tokens, "
                    "or have it credited.",
                    available=free,
                    needed=amount,
                )
            amount = 0 if key.balance is None else amount
            values = {"request_id": request_id, "key_id": key_id, "amount": amount, "owner": self.owner}
            connection.execute(NOTE_HOLD, {**values, "at": self._clock()})
            return amount

    def settle(self, row: Settled) -> int:
        """End a hold with what was used, and record the request. A request that was settled before stays unchanged.

        The cost is capped by the hold. If the hold is gone (its process was taken for dead), the cost is taken from the
        free balance, and the rest is recorded as unpaid. Returns the unpaid rest.

        Raises:
            Unwritable: the row can never be written.
        """
        with self._database.write() as connection:
            taken = self._charge(connection, row.key_id, row.request_id, row.cost)
            if taken is None:
                return 0
            charged, unpaid = taken
            values = {**asdict(row), "cost": charged, "seed": str(row.seed), "unpaid": unpaid}
            connection.execute(NOTE_REQUEST, values)
            return unpaid

    def set_aside(self, row: Settled, reason: str) -> None:
        """Settle a request whose row the table refuses: charge the same, and keep the row as text.

        Raises:
            Unwritable: not even that can be written.
        """
        request_id, key_id = _ascii(row.request_id), _ascii(row.key_id)
        with self._database.write() as connection:
            taken = self._charge(connection, key_id, request_id, row.cost)
            if taken is not None:
                connection.execute(
                    insert(SET_ASIDE).values(
                        request_id=request_id,
                        key_id=key_id,
                        charged=taken[0],
                        row=json.dumps(asdict(row)),
                        reason=_ascii(reason),
                        at=self._clock(),
                    )
                )

    def release(self, request_id: str) -> None:
        """End a hold without a charge. Does nothing if there is no such hold."""
        with self._database.write() as connection:
            key_id = connection.scalar(select(HOLDS.c.key_id).where(HOLDS.c.request_id == request_id))
            if key_id is not None:
                connection.execute(LOCK, {"key": key_id})
                amount = connection.scalar(HOLD, {"request": request_id}) or 0
                connection.execute(DROP_HOLD, {"request": request_id})
                connection.execute(CHARGE, {"key": key_id, "freed": amount, "charged": 0})

    def _charge(self, connection: Connection, key_id: str, request_id: str, cost: int) -> tuple[int, int] | None:
        """End a hold and take a request's cost: (charged, unpaid), or None if the request was settled before."""
        balance, held = connection.execute(LOCK, {"key": key_id}).first() or (None, 0)
        amount, settled = connection.execute(STATE, {"request": request_id}).one()
        if settled:
            return None
        cost = 0 if balance is None else cost
        charged = min(cost, max((balance or 0) - held, 0) if amount is None else amount)
        if amount is not None:
            connection.execute(DROP_HOLD, {"request": request_id})
        connection.execute(CHARGE, {"key": key_id, "freed": amount or 0, "charged": charged})
        return charged, min(cost - charged, _64_BITS) if amount is None else 0

    # -- the processes that hold -------------------------------------------------------------------------------------

    def beat(self) -> tuple[dict[str, int | None], int]:
        """Record that this process is alive, by raising its count.

        Returns the other processes that hold something or have a count, each with its count; and the number of
        settlements set aside that nobody has seen.
        """
        with self._database.write() as connection:
            mine = update(OWNERS).where(OWNERS.c.id == self.owner).values(beats=OWNERS.c.beats + 1)
            if connection.execute(mine).rowcount != 1:
                connection.execute(insert(OWNERS).values(id=self.owner, beats=1))
            known = union(select(HOLDS.c.owner.label("id")), select(OWNERS.c.id)).subquery()
            query = select(known.c.id, OWNERS.c.beats).outerjoin(OWNERS, OWNERS.c.id == known.c.id)
            others = {row.id: row.beats for row in connection.execute(query) if row.id != self.owner}
            aside = select(func.count()).select_from(SET_ASIDE).where(SET_ASIDE.c.seen.is_(None))
            return others, connection.scalar(aside) or 0

    def release_owner(self, owner: str, beats: int | None) -> int:
        """Release the holds of a process that is gone, unless its count has risen above `beats`.

        Returns the number of holds.
        """
        with self._database.write() as connection:
            now = connection.scalar(select(OWNERS.c.beats).where(OWNERS.c.id == owner).with_for_update())
            if now != beats:
                return 0
            connection.execute(delete(OWNERS).where(OWNERS.c.id == owner))
            requests = list(connection.scalars(select(HOLDS.c.request_id).where(HOLDS.c.owner == owner)))
        for request_id in requests:
            self.release(request_id)
        return len(requests)

    def leave(self) -> None:
        """Remove this process's count before it ends, unless it still holds something."""
        with self._database.write() as connection:
            holds = select(literal(1)).select_from(HOLDS).where(HOLDS.c.owner == self.owner).exists()
            connection.execute(delete(OWNERS).where(and_(OWNERS.c.id == self.owner, ~holds)))

    # -- settlements that were set aside -----------------------------------------------------------------------------

    def aside(self, *, seen: bool = False) -> list[dict[str, Any]]:
        """Return the settlements set aside that nobody has seen. `seen`: mark them as seen."""
        with self._database.write() as connection:
            query = select(SET_ASIDE).where(SET_ASIDE.c.seen.is_(None)).order_by(SET_ASIDE.c.at)
            rows = [dict(row._mapping) for row in connection.execute(query)]
            if seen:
                connection.execute(update(SET_ASIDE).where(SET_ASIDE.c.seen.is_(None)).values(seen=self._clock()))
        return rows


def _ascii(text: str) -> str:
    """Escape text so that every database accepts it."""
    return json.dumps(text)[1:-1]

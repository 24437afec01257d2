"""The SQL statements that every request needs, built once, because building one costs more than running it."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Text, bindparam, case, delete, exists, insert, or_, select, update

from server.ledger.tables import HOLDS, KEYS, REQUESTS, SET_ASIDE

__all__ = [
    "CHARGE",
    "DROP_HOLD",
    "HOLD",
    "KEY_OF_HASH",
    "KEY_OF_ID",
    "LOCK",
    "NOTE_HOLD",
    "NOTE_REQUEST",
    "STATE",
    "TAKE",
]

_KEY: Final = bindparam("key", type_=Text())
_REQUEST: Final = bindparam("request", type_=Text())
_AMOUNT: Final = bindparam("amount", type_=BigInteger())

KEY_OF_HASH: Final = select(KEYS).where(KEYS.c.hash == bindparam("hashed"))
KEY_OF_ID: Final = select(KEYS).where(KEYS.c.id == _KEY)

TAKE: Final = (
    update(KEYS)
    .where(KEYS.c.id == _KEY, KEYS.c.revoked.is_(None))
    .where(or_(KEYS.c.balance.is_(None), KEYS.c.balance - KEYS.c.held >= _AMOUNT))
    .values(held=KEYS.c.held + case((KEYS.c.balance.is_(None), 0), else_=_AMOUNT))
)
"""Set an amount aside, unless less than that is free or the key was revoked."""
NOTE_HOLD: Final = insert(HOLDS)

LOCK: Final = select(KEYS.c.balance, KEYS.c.held).where(KEYS.c.id == _KEY).with_for_update()
"""Read a key's balance and the held part, and lock both until the transaction ends."""
HOLD: Final = select(HOLDS.c.amount).where(HOLDS.c.request_id == _REQUEST)
DROP_HOLD: Final = delete(HOLDS).where(HOLDS.c.request_id == _REQUEST)
STATE: Final = select(
    HOLD.scalar_subquery().label("held"),
    or_(
        exists().where(REQUESTS.c.request_id == _REQUEST),
        exists().where(SET_ASIDE.c.request_id == _REQUEST),
    ).label("settled"),
)
"""Read what a request holds and whether it was settled. Use it after `LOCK`."""
_FREED: Final = bindparam("freed", type_=BigInteger())
_CHARGED: Final = bindparam("charged", type_=BigInteger())
CHARGE: Final = (
    update(KEYS)
    .where(KEYS.c.id == _KEY)
    .values(held=KEYS.c.held - _FREED, balance=KEYS.c.balance - _CHARGED)  # null stays null
)
NOTE_REQUEST: Final = insert(REQUESTS)

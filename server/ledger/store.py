"""Keys, balances and what was used: one database, written in transactions. Knows no HTTP, no model, no text.

    credit      adds to a key's balance
    hold        sets a request's worst case aside, or refuses: balance − held never falls below zero
    settle      ends a hold with what was really used; one row for each settled request, once, hold or no hold
    set_aside   the same for a row that the table refuses
    release     ends a hold with nothing

Each is one transaction, and taking money is one conditional UPDATE: two requests cannot spend the same balance,
whatever runs beside them, in this process or in another. Amounts are integers, in micro-credits or tokens as the prices
say. A key without a balance is not metered: its requests are recorded, not charged.

Times are Unix seconds from the `clock` that the ledger is given.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import Connection, and_, delete, func, insert, literal, select, union, update

from engine import VerbatimError
from server.ledger.database import Database
from server.ledger.money import (
    LARGEST,
    Key,
    LedgerFault,
    Limits,
    Locked,
    NewKey,
    NoBalance,
    Prices,
    Settled,
    UnknownKey,
    Unwritable,
    cost_of,
    read_since,
)
from server.ledger.reports import Reports, as_key
from server.ledger.statements import (
    CHARGE,
    DROP_HOLD,
    HOLD,
    KEY_OF_HASH,
    KEY_OF_ID,
    LOCK,
    NOTE_HOLD,
    NOTE_REQUEST,
    STATE,
    TAKE,
)
from server.ledger.tables import CREDITS, HOLDS, KEYS, OWNERS, SET_ASIDE

__all__ = [
    "LARGEST", "Key", "Ledger", "LedgerFault", "Limits", "Locked", "NewKey", "NoBalance", "Prices", "Settled",
    "UnknownKey", "Unwritable", "cost_of", "read_since",
]  # fmt: skip

_PREFIX: Final = "vk-"
_NO_LIMITS: Final = Limits()
_64_BITS: Final = 2**63 - 1


class Ledger(Reports):
    """The books behind keys and balances. Safe to use from several threads and processes.

    Args:
        url: SQLAlchemy's; `sqlite:///FILE` or `postgresql+psycopg://…`.
        clock: Unix seconds.
        owner: names this process among those that hold; a fresh one each start.

    Raises:
        LedgerFault: it cannot be opened, is damaged, or is of a newer version.
    """

    def __init__(self, url: str, clock: Callable[[], float], owner: str = "") -> None:
        self._clock = clock
        self.owner = owner or secrets.token_hex(8)
        self._database = Database(url, clock)

    def close(self) -> None:
        """Give the connections back."""
        self._database.close()

    # -- keys --------------------------------------------------------------------------------------------------------

    def create_key(
        self,
        name: str,
        *,
        balance: int | None = None,
        expires: float | None = None,
        models: Sequence[str] = (),
        limits: Limits = _NO_LIMITS,
    ) -> NewKey:
        """A key of 256 random bits. Only its hash is kept: nobody can read the secret from the database.

        Raises:
            VerbatimError: the name is taken or no name, the balance is negative, or a number is too large.
        """
        if not name.strip() or len(name) > 200 or not name.isprintable():
            raise VerbatimError(f"a name has 1 to 200 printable characters, unlike {name[:200]!r}.")
        _bounded("a balance", balance)
        secret = _PREFIX + secrets.token_urlsafe(32)
        row: dict[str, Any] = {
            "id": f"key_{secrets.token_hex(8)}",
            "name": name,
            "hash": _hash(secret),
            "shown": secret[:9] + "…",
            "created": self._clock(),
            "expires": expires,
            "models": json.dumps(list(models)),
            "balance": balance,
            "held": 0,
            **_columns(limits),
        }
        with self._database.write() as connection:
            if connection.execute(select(KEYS.c.id).where((KEYS.c.name == name) | (KEYS.c.id == name))).first():
                raise VerbatimError(f"there is a key named {name!r} already, or with this id.")
            connection.execute(insert(KEYS).values(row))
            if balance:
                self._note_credit(connection, row["id"], balance, "at creation")
            return NewKey(_by_id(connection, row["id"]), secret)

    def authenticate(self, secret: str) -> Key | None:
        """The key that a secret opens, or None. Looked up by its hash, so that time says nothing of near misses."""
        with self._database.read() as connection:
            row = connection.execute(KEY_OF_HASH, {"hashed": _hash(secret)}).first()
        key = None if row is None or not hmac.compare_digest(row.hash, _hash(secret)) else as_key(row)
        return key if key is not None and key.usable(self._clock()) else None

    def all_keys(self) -> list[Key]:
        """All of them, oldest first, revoked ones too."""
        with self._database.read() as connection:
            return [as_key(row) for row in connection.execute(select(KEYS).order_by(KEYS.c.created, KEYS.c.id))]

    def key(self, name: str) -> Key:
        """By id or name.

        Raises:
            UnknownKey: there is none.
            VerbatimError: it is one key's id and another's name.
        """
        with self._database.read() as connection:
            return _named(connection, name)

    def revoke(self, name: str) -> Key:
        """From now on the key opens nothing; running requests end as they would. Its history stays."""
        with self._database.write() as connection:
            key = _named(connection, name)
            if key.revoked is None:
                connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(revoked=self._clock()))
            return _by_id(connection, key.id)

    def limit(self, name: str, limits: Limits, models: Sequence[str] | None = None) -> Key:
        """Replace a key's limits; `models`: also what it may use."""
        values = _columns(limits)
        with self._database.write() as connection:
            key = _named(connection, name)
            if models is not None:
                values["models"] = json.dumps(list(models))
            connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(values))
            return _by_id(connection, key.id)

    def credit(self, name: str, amount: int, note: str = "") -> Key:
        """Add to a balance; a negative amount takes away what is there and not held. Makes a free key a metered one.

        Raises:
            NoBalance: less is free than is to be taken away.
            VerbatimError: the balance would be more than a balance can be.
        """
        _bounded("an amount", abs(amount))
        if len(note) > 1000 or not (note.isprintable() or not note):
            raise VerbatimError(f"a note has at most 1000 printable characters, unlike {note[:200]!r}.")
        with self._database.write() as connection:
            key = _named(connection, name)
            before = func.coalesce(KEYS.c.balance, 0)
            done = connection.execute(
                update(KEYS)
                .where(KEYS.c.id == key.id, before - KEYS.c.held >= -amount, before <= LARGEST - max(amount, 0))
                .values(balance=before + amount)
            )
            if done.rowcount != 1:
                has = key.balance or 0
                if amount > 0:
                    raise VerbatimError(f"a balance is at most {LARGEST}; {key.name} has {has}, and {amount} is more.")
                raise NoBalance(f"{key.name} has {has - key.held} to take away, not {-amount}.")
            self._note_credit(connection, key.id, amount, note)
            return _by_id(connection, key.id)

    # -- requests ----------------------------------------------------------------------------------------------------

    def hold(self, key_id: str, request_id: str, amount: int) -> int:
        """Set a request's worst case aside; returns how much that was: nothing for a key that is not metered.

        Raises:
            NoBalance: the balance does not cover it.
            UnknownKey: there is no such key, or it was revoked in between.
        """
        amount = min(amount, _64_BITS)  # more than any balance
        with self._database.write() as connection:
            held = connection.execute(TAKE, {"key": key_id, "amount": amount})
            key = _by_id(connection, key_id)
            if held.rowcount != 1:
                if key.revoked is not None:
                    raise UnknownKey(f"the key {key.name!r} was revoked.")
                free = (key.balance or 0) - key.held
                raise NoBalance(
                    f"the key {key.name!r} has {free} left, and this request may cost {amount}. Ask for fewer tokens "
                    "(max_completion_tokens), or have it credited.",
                    available=free,
                    needed=amount,
                )
            amount = 0 if key.balance is None else amount
            values = {"request_id": request_id, "key_id": key_id, "amount": amount, "owner": self.owner}
            connection.execute(NOTE_HOLD, {**values, "at": self._clock()})
            return amount

    def settle(self, row: Settled) -> int:
        """End a hold with what was used, and record it. A request that is settled stays as it is.

        The cost is capped by the hold. Where the hold is gone (its process was taken for dead) the cost is taken from
        what is free, and what that does not cover is recorded as unpaid. Returns that rest.

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
        """Settle a row that the table of requests does not take: the same charge, and the row as text.

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
        """End a hold with nothing. Does nothing if there is none."""
        with self._database.write() as connection:
            key_id = connection.scalar(select(HOLDS.c.key_id).where(HOLDS.c.request_id == request_id))
            if key_id is not None:
                connection.execute(LOCK, {"key": key_id})
                amount = connection.scalar(HOLD, {"request": request_id}) or 0
                connection.execute(DROP_HOLD, {"request": request_id})
                connection.execute(CHARGE, {"key": key_id, "freed": amount, "charged": 0})

    def _charge(self, connection: Connection, key_id: str, request_id: str, cost: int) -> tuple[int, int] | None:
        """End a hold and take a request's cost, once: (charged, unpaid), or None if that was done before."""
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

    # -- those who hold ----------------------------------------------------------------------------------------------

    def beat(self) -> tuple[dict[str, int | None], int]:
        """Say that this process lives.

        Returns the others that hold or said so, with their counts; and how many settlements that were set aside nobody
        has looked at.
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
        """Release what a process holds that is gone, unless it has said since `beats` that it lives.

        Returns how many holds there were.
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
        """Say that this process is about to end, if it holds nothing."""
        with self._database.write() as connection:
            holds = select(literal(1)).select_from(HOLDS).where(HOLDS.c.owner == self.owner).exists()
            connection.execute(delete(OWNERS).where(and_(OWNERS.c.id == self.owner, ~holds)))

    # -- what was set aside ------------------------------------------------------------------------------------------

    def aside(self, *, seen: bool = False) -> list[dict[str, Any]]:
        """Settlements that were set aside and that nobody has looked at. `seen`: from now on somebody has."""
        with self._database.write() as connection:
            query = select(SET_ASIDE).where(SET_ASIDE.c.seen.is_(None)).order_by(SET_ASIDE.c.at)
            rows = [dict(row._mapping) for row in connection.execute(query)]
            if seen:
                connection.execute(update(SET_ASIDE).where(SET_ASIDE.c.seen.is_(None)).values(seen=self._clock()))
        return rows

    def _note_credit(self, connection: Connection, key_id: str, amount: int, note: str) -> None:
        connection.execute(insert(CREDITS).values(key_id=key_id, amount=amount, note=note, at=self._clock()))


# -- the parts ---------------------------------------------------------------------------------------------------------


def _named(connection: Connection, name: str) -> Key:
    """The key with an id or a name. A word that is both, of two keys, is refused: the wrong one might be revoked."""
    found = []
    if name.isprintable():  # else a database may refuse to look for it, and there is none
        query = select(KEYS).where((KEYS.c.id == name) | (KEYS.c.name == name))
        found = [as_key(row) for row in connection.execute(query)]
    if not found:
        raise UnknownKey(f"there is no key {name[:200]!r}.")
    if len(found) > 1:
        one, other = sorted(found, key=lambda key: key.id != name)
        raise VerbatimError(
            f"{name!r} is the id of the key named {one.name!r}, and the name of the key with the id {other.id}: call "
            "the first by its name, the second by its id."
        )
    return found[0]


def _by_id(connection: Connection, key_id: str) -> Key:
    row = connection.execute(KEY_OF_ID, {"key": key_id}).first()
    if row is None:
        raise UnknownKey(f"there is no key with the id {key_id[:200]!r}.")
    return as_key(row)


def _bounded(what: str, number: int | None) -> None:
    if number is not None and not 0 <= number <= LARGEST:
        kind = "must not be negative, and" if number < 0 else f"is at most {LARGEST}, not"
        raise VerbatimError(f"{what} {kind} {number}{' is' if number < 0 else ''}.")


def _columns(limits: Limits) -> dict[str, Any]:
    values = asdict(limits)
    for name, number in values.items():
        _bounded(f"the limit {name}", number)
    return values


def _ascii(text: str) -> str:
    """Text that every database takes, whatever is in it."""
    return json.dumps(text)[1:-1]


def _hash(secret: str) -> str:
    """A random key of 256 bits needs no slow hash: there is nothing to guess."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()

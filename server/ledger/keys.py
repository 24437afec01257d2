"""Keys and their balances: made, found, limited, credited, revoked. Each verb is one transaction.

Of a key only its hash is stored. Times are Unix seconds from the ledger's clock.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import Connection, func, insert, select, update

from engine import VerbatimError
from server.ledger.database import LedgerPart
from server.ledger.records import LARGEST, Key, Limits, NewKey, NoBalance, UnknownKey
from server.ledger.statements import KEY_OF_HASH, KEY_OF_ID
from server.ledger.tables import CREDITS, KEYS

__all__ = ["Keys", "as_key", "key_by_id", "key_named"]

_PREFIX: Final = "vk-"
_NO_LIMITS: Final = Limits()


class Keys(LedgerPart):
    """The ledger's verbs for keys and balances."""

    def create_key(
        self,
        name: str,
        *,
        balance: int | None = None,
        expires: float | None = None,
        models: Sequence[str] = (),
        limits: Limits = _NO_LIMITS,
        admin: bool = False,
    ) -> NewKey:
        """Make a key of 256 random bits. Only its hash is stored: nobody can read the secret from the database.

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
            "admin": int(admin),
            **_columns(limits),
        }
        with self._database.write() as connection:
            if connection.execute(select(KEYS.c.id).where((KEYS.c.name == name) | (KEYS.c.id == name))).first():
                raise VerbatimError(f"there is a key named {name!r} already, or with this id.")
            connection.execute(insert(KEYS).values(row))
            if balance:
                self._note_credit(connection, row["id"], balance, "at creation")
            return NewKey(key_by_id(connection, row["id"]), secret)

    def authenticate(self, secret: str) -> Key | None:
        """Return the usable key with this secret, or None. It is found by its hash, so that timing tells nothing."""
        with self._database.read() as connection:
            row = connection.execute(KEY_OF_HASH, {"hashed": _hash(secret)}).first()
        key = None if row is None or not hmac.compare_digest(row.hash, _hash(secret)) else as_key(row)
        return key if key is not None and key.usable(self._clock()) else None

    def all_keys(self) -> list[Key]:
        """Return all keys, the oldest first, revoked ones included."""
        with self._database.read() as connection:
            return [as_key(row) for row in connection.execute(select(KEYS).order_by(KEYS.c.created, KEYS.c.id))]

    def key(self, name: str) -> Key:
        """Return the key with this id or name.

        Raises:
            UnknownKey: there is none.
            VerbatimError: this is one key's id and another's name.
        """
        with self._database.read() as connection:
            return key_named(connection, name)

    def revoke(self, name: str) -> Key:
        """Revoke a key: new requests with it are refused, running ones finish. Its history stays."""
        with self._database.write() as connection:
            key = key_named(connection, name)
            if key.revoked is None:
                connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(revoked=self._clock()))
            return key_by_id(connection, key.id)

    def limit(self, name: str, limits: Limits, models: Sequence[str] | None = None) -> Key:
        """Replace a key's limits and, if `models` is given, the models that it may use."""
        values = _columns(limits)
        with self._database.write() as connection:
            key = key_named(connection, name)
            if models is not None:
                values["models"] = json.dumps(list(models))
            connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(values))
            return key_by_id(connection, key.id)

    def credit(self, name: str, amount: int, note: str = "") -> Key:
        """Add to a balance. A negative amount is taken from what is not held. A key without a balance gets one.

        Raises:
            NoBalance: more is to be taken away than is free.
            VerbatimError: the balance would exceed the largest one.
        """
        _bounded("an amount", abs(amount))
        if len(note) > 1000 or not (note.isprintable() or not note):
            raise VerbatimError(f"a note has at most 1000 printable characters, unlike {note[:200]!r}.")
        with self._database.write() as connection:
            key = key_named(connection, name)
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
            return key_by_id(connection, key.id)

    def _note_credit(self, connection: Connection, key_id: str, amount: int, note: str) -> None:
        connection.execute(insert(CREDITS).values(key_id=key_id, amount=amount, note=note, at=self._clock()))


def as_key(row: Any) -> Key:
    """Build a key from its row."""
    return Key(
        row.id,
        row.name,
        row.shown,
        row.created,
        row.expires,
        row.revoked,
        tuple(json.loads(row.models)),
        row.balance,
        row.held,
        Limits(row.requests_per_minute, row.tokens_per_minute, row.concurrent, row.context),
        bool(row.admin),
    )


def key_named(connection: Connection, name: str) -> Key:
    """Find a key by its id or name. A word that is one key's id and another's name is refused: it is ambiguous."""
    found = []
    if name.isprintable():  # no key has another name, and some databases refuse to look for it
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


def key_by_id(connection: Connection, key_id: str) -> Key:
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


def _hash(secret: str) -> str:
    """Hash a secret. A random one of 256 bits cannot be guessed, so the hash need not be slow."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()

"""`Keeper`: a place where receipts are kept. Two kinds: a folder, and the ledger.

Owners are the ids of keys, or `ANONYMOUS` on a server without keys. A keeper is used from several threads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Protocol

from engine import InvalidParameter
from server.errors import KeepingFault
from server.ledger.records import LedgerFault
from server.ledger.store import Ledger

__all__ = ["ANONYMOUS", "Keeper", "Kept", "LedgerKeeper", "Written", "is_receipt_id", "page_size"]

ANONYMOUS: Final = "anonymous"
"""The owner of receipts on a server without keys."""

MOST_LISTED: Final = 100
"""Receipts of one page."""

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def is_receipt_id(text: str) -> bool:
    """Return whether a text may be a receipt's id: letters, digits, `-` and `_`, so that no path hides in it."""
    return _ID.fullmatch(text) is not None


def page_size(given: str | None) -> int:
    """Read how many receipts a page holds: 1 to 100, by default 20.

    Raises:
        InvalidParameter: it is anything else.
    """
    if given is None:
        return 20
    size = int(given) if given.isascii() and given.isdigit() and len(given) < 4 else 0
    if not 1 <= size <= MOST_LISTED:
        raise InvalidParameter(
            f"limit must be an integer between 1 and {MOST_LISTED}, not {given[:100]!r}.", param="limit"
        )
    return size


@dataclass(frozen=True, slots=True)
class Written:
    """A finished receipt: `body` is its JSON as it is kept, a receipt or its signed envelope."""

    id: str
    model: str
    created: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """What a list tells of a receipt. `created`: Unix seconds."""

    id: str
    owner: str
    model: str
    created: int


class Keeper(Protocol):
    """A place for receipts. Every method may raise `KeepingFault`."""

    def put(self, owner: str, written: Written) -> None:
        """Keep a receipt: once this returns, it survives a power cut. A failure leaves nothing behind."""

    def get(self, owner: str | None, id: str) -> bytes | None:
        """Return an owner's receipt (any owner's if that is None), or None."""

    def list(self, owner: str | None, after: str | None, most: int) -> list[Kept]:
        """List an owner's receipts (everybody's if that is None), newest first, beginning after the id `after`."""

    def sweep(self, before: float) -> int:
        """Delete what was created before a time, and what a crash has left. Returns the number of receipts."""

    def close(self) -> None:
        """Close what is open."""


class LedgerKeeper:
    """Keeps receipts in the ledger's database."""

    def __init__(self, ledger: Ledger) -> None:
        """`ledger`: closed with the keeper."""
        self._ledger = ledger

    def put(self, owner: str, written: Written) -> None:
        try:
            self._ledger.keep_receipt(
                id=written.id,
                key_id=owner,
                model=written.model,
                created=written.created,
                body=written.body.decode(),
            )
        except LedgerFault as error:
            raise KeepingFault(error.message) from error

    def get(self, owner: str | None, id: str) -> bytes | None:
        if not is_receipt_id(id):  # no database holds every text
            return None
        try:
            body = self._ledger.kept_receipt(id, owner)
        except LedgerFault as error:
            raise KeepingFault(error.message) from error
        return None if body is None else body.encode()

    def list(self, owner: str | None, after: str | None, most: int) -> list[Kept]:
        if after is not None and not is_receipt_id(after):
            return []
        try:
            rows = self._ledger.kept_receipts(owner, after, most)
        except LedgerFault as error:
            raise KeepingFault(error.message) from error
        return [Kept(row["id"], row["key_id"], row["model"], row["created"]) for row in rows]

    def sweep(self, before: float) -> int:
        try:
            return self._ledger.drop_receipts(before)
        except LedgerFault as error:
            raise KeepingFault(error.message) from error

    def close(self) -> None:
        self._ledger.close()

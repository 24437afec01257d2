"""Receipts that are kept in the ledger's database: their bodies as text, found by key. Reads none of them."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import and_, delete, insert, or_, select

from server.ledger.database import LedgerPart
from server.ledger.tables import RECEIPTS

__all__ = ["KeptReceipts"]

_AT_ONCE: Final = 500  # receipts deleted in one transaction: other writes wait for it


class KeptReceipts(LedgerPart):
    """The ledger's verbs for receipts. `key_id`: the owner's key; a server without keys has a name in its place."""

    def keep_receipt(self, *, id: str, key_id: str, model: str, created: int, body: str) -> None:
        """Store a receipt.

        Raises:
            Unwritable: there is one with this id, or the database cannot hold it.
        """
        values = {"id": id, "key_id": key_id, "model": model, "created": created, "body": body}
        with self._database.write() as connection:
            connection.execute(insert(RECEIPTS), values)

    def kept_receipt(self, id: str, key_id: str | None) -> str | None:
        """Return the body of a receipt; None if this key has none with this id. `key_id`: None for any key's."""
        query = select(RECEIPTS.c.body).where(RECEIPTS.c.id == id)
        if key_id is not None:
            query = query.where(RECEIPTS.c.key_id == key_id)
        with self._database.read() as connection:
            body: str | None = connection.scalar(query)
        return body

    def kept_receipts(self, key_id: str | None, after: str | None, most: int) -> list[dict[str, Any]]:
        """List receipts without their bodies, newest first: `id`, `key_id`, `model`, `created`.

        Args:
            key_id: whose; None for those of all keys.
            after: begin after the receipt with this id. If this key has none, the list is empty.
        """
        columns = (RECEIPTS.c.id, RECEIPTS.c.key_id, RECEIPTS.c.model, RECEIPTS.c.created)
        query = select(*columns).order_by(RECEIPTS.c.created.desc(), RECEIPTS.c.id.desc()).limit(most)
        own = [] if key_id is None else [RECEIPTS.c.key_id == key_id]
        with self._database.read() as connection:
            if after is not None:
                created = connection.scalar(select(RECEIPTS.c.created).where(RECEIPTS.c.id == after, *own))
                if created is None:
                    return []
                same = and_(RECEIPTS.c.created == created, RECEIPTS.c.id < after)
                query = query.where(or_(RECEIPTS.c.created < created, same))
            return [dict(row._mapping) for row in connection.execute(query.where(*own))]

    def drop_receipts(self, before: float) -> int:
        """Delete the receipts that were created before a time. Returns how many."""
        old = select(RECEIPTS.c.id).where(RECEIPTS.c.created < before).limit(_AT_ONCE)
        total = 0
        while True:
            with self._database.write() as connection:
                dropped = connection.execute(delete(RECEIPTS).where(RECEIPTS.c.id.in_(old))).rowcount
            total += dropped
            if dropped < _AT_ONCE:
                return total

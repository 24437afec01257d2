"""The ledger: keys, balances, requests and kept receipts in one database. Knows no HTTP and no model."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from server.ledger.database import Database
from server.ledger.holds import Holds
from server.ledger.kept_receipts import KeptReceipts
from server.ledger.keys import Keys
from server.ledger.reports import Reports

__all__ = ["Ledger"]


class Ledger(Keys, Holds, Reports, KeptReceipts):
    """The ledger in a database. Safe to use from several threads and processes.

    Args:
        url: SQLAlchemy's; `sqlite:///FILE` or `postgresql+psycopg://…`.
        clock: returns Unix seconds; every time in the ledger comes from it.
        owner: names this process among those that hold; a fresh one each start.

    Raises:
        LedgerFault: it cannot be opened, is damaged, or is of a newer version.
    """

    def __init__(self, url: str, clock: Callable[[], float], owner: str = "") -> None:
        self._clock = clock
        self.owner = owner or secrets.token_hex(8)
        self._database = Database(url, clock)

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

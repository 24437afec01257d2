"""What the books add up to: usage by key, day and model, and whether the sums agree. Reads only."""

from __future__ import annotations

import datetime as dt
import json
from abc import ABC, abstractmethod
from typing import Any, Final

from sqlalchemy import Integer, func, select

from server.ledger.database import Database
from server.ledger.money import Key, Limits
from server.ledger.tables import CREDITS, HOLDS, KEYS, REQUESTS, SET_ASIDE

__all__ = ["Reports", "as_key"]

_SUMS: Final = ("prompt_tokens", "cached_tokens", "completion_tokens", "cost")


class Reports(ABC):
    """The reading half of a ledger; the other half knows where it is, and finds keys."""

    _database: Database

    @abstractmethod
    def key(self, name: str) -> Key:
        """By id or name."""

    def usage(
        self,
        *,
        key: str | None = None,
        key_id: str | None = None,
        since: float | None = None,
        by: str | None = None,
    ) -> list[dict[str, Any]]:
        """Sums over settled requests, one row for each key and, with `by`, each `day` (`2026-11-01`) or `model`.

        `key`: of one key, by name or id; `key_id`: by nothing but its id.
        """
        columns: list[Any] = [KEYS.c.name.label("key")]
        if by == "model":
            columns.append(REQUESTS.c.model.label("model"))
        elif by == "day":
            days = REQUESTS.c.ended / 86400
            whole = days if self._database.kind == "sqlite" else func.floor(days)  # whose cast rounds
            columns.append(func.cast(whole, Integer).label("day"))
        sums = [func.count().label("requests"), *(func.sum(REQUESTS.c[name]).label(name) for name in _SUMS)]
        query = select(*columns, *sums).join(KEYS, KEYS.c.id == REQUESTS.c.key_id)
        if key is not None:
            key_id = self.key(key).id
        if key_id is not None:
            query = query.where(KEYS.c.id == key_id)
        if since is not None:
            query = query.where(REQUESTS.c.ended >= since)
        with self._database.report() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query.group_by(*columns).order_by(*columns))]
        for row in rows:
            row.update({name: int(row[name]) for name in _SUMS})  # PostgreSQL's sums are decimals
            if by == "day":
                row["day"] = dt.datetime.fromtimestamp(row["day"] * 86400, dt.UTC).date().isoformat()
        return rows

    def check(self) -> list[str]:
        """What does not add up, in words; empty if all of it does: credits − costs = balance, holds = held."""
        problems = []
        with self._database.report() as connection:
            for key in (as_key(row) for row in connection.execute(select(KEYS))):
                credits, costs, aside, held = (
                    int(connection.scalar(select(func.sum(column)).where(column.table.c.key_id == key.id)) or 0)
                    for column in (CREDITS.c.amount, REQUESTS.c.cost, SET_ASIDE.c.charged, HOLDS.c.amount)
                )
                if key.balance is not None and key.balance != credits - costs - aside:
                    problems.append(f"{key.name}: balance {key.balance}, but credits {credits} − costs {costs + aside}")
                if key.held != held:
                    problems.append(f"{key.name}: held {key.held}, but holds of {held}")
        return problems


def as_key(row: Any) -> Key:
    """A row of the table of keys as a key."""
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
    )

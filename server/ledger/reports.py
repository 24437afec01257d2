"""Sums over the ledger: usage by key, day and model, and whether its parts agree. Only reads."""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

from sqlalchemy import Integer, func, select

from server.ledger.database import LedgerPart
from server.ledger.keys import as_key, key_named
from server.ledger.records import Key
from server.ledger.tables import CREDITS, HOLDS, KEYS, REQUESTS, SET_ASIDE

__all__ = ["Reports"]

_SUMS: Final = ("prompt_tokens", "cached_tokens", "completion_tokens", "cost")


class Reports(LedgerPart):
    """The ledger's sums."""

    def usage(
        self,
        *,
        key: str | None = None,
        key_id: str | None = None,
        since: float | None = None,
        by: str | None = None,
    ) -> list[dict[str, Any]]:
        """Sum up settled requests: one row per key and, with `by`, per `day` (`2026-11-01`) or `model`.

        `key`: only the key with this name or id; `key_id`: only the key with this id.
        """
        columns: list[Any] = [KEYS.c.name.label("key")]
        if by == "model":
            columns.append(REQUESTS.c.model.label("model"))
        elif by == "day":
            days = REQUESTS.c.ended / 86400
            whole = days if self._database.kind == "sqlite" else func.floor(days)  # PostgreSQL's cast rounds
            columns.append(func.cast(whole, Integer).label("day"))
        sums = [func.count().label("requests"), *(func.sum(REQUESTS.c[name]).label(name) for name in _SUMS)]
        query = select(*columns, *sums).join(KEYS, KEYS.c.id == REQUESTS.c.key_id)
        if key is not None:
            with self._database.read() as connection:
                key_id = key_named(connection, key).id
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

    def keys_and_sums(self) -> list[tuple[Key, dict[str, int]]]:
        """Return all keys, the oldest first, each with the number and the sums of its settled requests."""
        sums = [func.count(REQUESTS.c.request_id), *(func.coalesce(func.sum(REQUESTS.c[name]), 0) for name in _SUMS)]
        query = select(KEYS, *sums).outerjoin(REQUESTS, KEYS.c.id == REQUESTS.c.key_id)
        with self._database.report() as connection:
            rows = list(connection.execute(query.group_by(KEYS.c.id).order_by(KEYS.c.created, KEYS.c.id)))
        names = ("requests", *_SUMS)
        return [(as_key(row), dict(zip(names, map(int, row[-len(names) :]), strict=True))) for row in rows]

    def check(self) -> list[str]:
        """Describe every key whose sums disagree: credits − costs = balance and holds = held must be true."""
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

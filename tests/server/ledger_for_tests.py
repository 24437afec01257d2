"""What tests of the ledger share: a clock, an empty PostgreSQL, a settled request, and what a database may do wrong."""

from __future__ import annotations

import os
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url

from server.ledger.records import Settled
from server.ledger.store import Ledger


def _database() -> str:
    """The URL of a database that tests may empty; where several processes run tests, one of this process's own."""
    url, worker = os.environ.get("VERBATIM_TEST_POSTGRES", ""), os.environ.get("PYTEST_XDIST_WORKER", "")
    if not url or not worker:
        return url
    name = f"verbatim_{worker}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if not connection.exec_driver_sql(f"SELECT 1 FROM pg_database WHERE datname = '{name}'").first():
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return make_url(url).set(database=name).render_as_string(hide_password=False)


POSTGRES = _database()
"""postgresql+psycopg://…, or nothing."""
WITH_POSTGRES = pytest.mark.skipif(not POSTGRES, reason="VERBATIM_TEST_POSTGRES names no database")


class Clock:
    """Moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def empty_postgres() -> str:
    """The URL of a PostgreSQL database in which nothing is left."""
    engine = create_engine(POSTGRES)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()
    return POSTGRES


def row(key_id: str, request_id: str, cost: int, **fields: Any) -> Settled:
    """A request that has ended."""
    known: dict[str, Any] = {
        "request_id": request_id, "key_id": key_id, "model": "m", "prompt_tokens": 3, "cached_tokens": 1,
        "completion_tokens": 4, "reasoning_tokens": 2, "cost": cost, "seed": 2**64 - 1, "fingerprint": "vb-0",
        "finish_reason": "stop", "started": 1_800_000_000.0, "ended": 1_800_000_001.0,
    }  # fmt: skip
    return Settled(**{**known, **fields})


def query(ledger: Ledger, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Rows of a ledger's database, as they stand in it."""
    with ledger._database._engine.connect() as connection:
        found = connection.exec_driver_sql(statement, parameters or None)
        return [tuple(one) for one in found] if found.returns_rows else []

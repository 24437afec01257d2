"""The ledger's tables, their migrations, and the meaning of a database's errors. Knows no rule of money."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import (
    URL,
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from server.ledger.records import LedgerFault, Locked, Unwritable

__all__ = ["CREDITS", "HOLDS", "KEYS", "OWNERS", "RECEIPTS", "REQUESTS", "SET_ASIDE", "faults", "migrate", "name_of"]

_LOCK_NOT_AVAILABLE: Final = "55P03"  # PostgreSQL's code for a lock that took too long

_META: Final = MetaData()
_MIGRATIONS: Final = Table("migrations", _META, Column("name", Text, primary_key=True), Column("at", Float))
KEYS: Final = Table(
    "keys",
    _META,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("hash", Text, nullable=False, unique=True),
    Column("shown", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("models", Text, nullable=False, default="[]"),
    Column("balance", BigInteger),
    Column("held", BigInteger, nullable=False, default=0),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent", BigInteger),
    Column("context", BigInteger),
    Column("admin", BigInteger, nullable=False, server_default="0"),  # 0 or 1
    CheckConstraint("balance IS NULL OR balance >= 0", name="no_debt"),
    CheckConstraint("held >= 0", name="no_negative_hold"),
)
CREDITS: Final = Table(
    "credits",
    _META,
    Column("id", Integer, primary_key=True),
    Column("key_id", Text, ForeignKey("keys.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("note", Text, nullable=False, default=""),
    Column("at", Float, nullable=False),
)
HOLDS: Final = Table(
    "holds",
    _META,
    Column("request_id", Text, primary_key=True),
    Column("key_id", Text, ForeignKey("keys.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
    Column("at", Float, nullable=False),
)
REQUESTS: Final = Table(
    "requests",
    _META,
    Column("request_id", Text, primary_key=True),
    Column("key_id", Text, ForeignKey("keys.id"), nullable=False),
    Column("model", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("cost", BigInteger, nullable=False),
    Column("seed", Text, nullable=False),  # 64 bits unsigned: more than a signed integer holds
    Column("fingerprint", Text, nullable=False),
    Column("finish_reason", Text, nullable=False),  # of every choice
    Column("started", Float, nullable=False),
    Column("ended", Float, nullable=False),
    Column("unpaid", BigInteger, nullable=False, server_default="0"),
    Index("requests_by_key", "key_id", "ended"),
)
OWNERS: Final = Table(
    "owners", _META, Column("id", Text, primary_key=True), Column("beats", BigInteger, nullable=False)
)
"""The processes that hold. A process is alive while its count rises."""
SET_ASIDE: Final = Table(
    "set_aside",
    _META,
    Column("request_id", Text, primary_key=True),
    Column("key_id", Text, nullable=False),  # no foreign key: a missing key may be the fault
    Column("charged", BigInteger, nullable=False),
    Column("row", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("seen", Float),
)
"""Settlements that the table `requests` refused, as JSON."""

RECEIPTS: Final = Table(
    "receipts",
    _META,
    Column("id", Text, primary_key=True),
    Column("key_id", Text, nullable=False),  # no foreign key: a server without keys keeps receipts, too
    Column("model", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("body", Text, nullable=False),
    Index("receipts_by_key", "key_id", "created", "id"),
    Index("receipts_by_age", "created"),
)


def _widths(connection: Connection) -> None:
    """Widen columns: PostgreSQL refused texts of more than 32 characters and numbers above 2³¹ − 1."""
    if connection.dialect.name != "postgresql":
        # A balance beyond 64 bits had become a float, which is not exact.
        connection.execute(text("UPDATE keys SET balance = CAST(balance AS INTEGER), held = CAST(held AS INTEGER)"))
        return
    for table, columns, kind in (
        ("migrations", ("name",), "TEXT"),
        ("keys", ("id", "name", "hash", "shown"), "TEXT"),
        ("keys", ("requests_per_minute", "tokens_per_minute", "concurrent", "context"), "BIGINT"),
        ("credits", ("key_id",), "TEXT"),
        ("holds", ("request_id", "key_id", "owner"), "TEXT"),
        ("requests", ("request_id", "key_id", "model", "seed", "fingerprint", "finish_reason"), "TEXT"),
        ("requests", ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"), "BIGINT"),
    ):
        changes = ", ".join(f"ALTER COLUMN {column} TYPE {kind}" for column in columns)
        connection.execute(text(f"ALTER TABLE {table} {changes}"))


def _owners(connection: Connection) -> None:
    """Add the tables of processes and of settlements set aside, and the unpaid rest of a request."""
    OWNERS.create(connection, checkfirst=True)
    SET_ASIDE.create(connection, checkfirst=True)
    connection.execute(text("ALTER TABLE requests ADD COLUMN unpaid BIGINT NOT NULL DEFAULT 0"))


def _receipts(connection: Connection) -> None:
    """Add the table of kept receipts."""
    RECEIPTS.create(connection, checkfirst=True)


def _admin(connection: Connection) -> None:
    """Add whether a key may manage the server. Older keys may not."""
    connection.execute(text("ALTER TABLE keys ADD COLUMN admin BIGINT NOT NULL DEFAULT 0"))


_STEPS: Final[tuple[tuple[str, Callable[[Connection], None]], ...]] = (
    ("0001-first", _META.create_all),
    ("0002-widths", _widths),
    ("0003-owners", _owners),
    ("0004-receipts", _receipts),
    ("0005-admin", _admin),
)
"""Every migration, in order. One whose name was recorded is not applied again."""


def migrate(connection: Connection, clock: Callable[[], float]) -> None:
    """Create the current tables in an empty database, or migrate older ones step by step.

    Raises:
        LedgerFault: the tables are of a newer release.
    """
    if connection.dialect.name == "postgresql":  # two servers may start at once, and a large table takes long
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(7239440611)"))
    _MIGRATIONS.create(connection, checkfirst=True)
    applied = set(connection.scalars(select(_MIGRATIONS.c.name)))
    unknown = applied - {name for name, _ in _STEPS}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise LedgerFault(
            f"the ledger {name_of(connection.engine.url)} is of a newer version: it has changes that this one does not "
            f"know ({names})."
        )
    fresh = not applied
    for name, step in _STEPS:
        if name not in applied:
            if not fresh or name == _STEPS[0][0]:  # the first creates the current tables
                step(connection)
            connection.execute(insert(_MIGRATIONS).values(name=name, at=clock()))
    connection.execute(update(_MIGRATIONS).values(at=_MIGRATIONS.c.at))  # fails now if the ledger is read-only


def name_of(url: URL) -> str:
    """Return how errors name a ledger: by its file, or by its URL without the password."""
    if url.get_backend_name() == "sqlite" and url.database:
        return url.database
    return url.render_as_string(hide_password=True)


@contextmanager
def faults(name: str) -> Iterator[None]:
    """Turn a database's errors into one sentence, without their SQL statements, which hold hashes of keys.

    `name`: of the ledger, as `name_of` writes it; empty if its URL cannot be read.

    Raises:
        Unwritable: the values are too large, are text that it cannot store, or break a rule of the tables.
        Locked: another process holds a lock on one row. (SQLite locks the whole file: that is a `LedgerFault`.)
        LedgerFault: anything else.
    """
    ledger = f"the ledger {name}" if name else "the ledger"
    try:
        yield
    except (OverflowError, UnicodeError) as error:  # raised by the driver before it calls the database
        raise Unwritable(f"{ledger} cannot hold a value: {_one_line(error)}.") from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        if isinstance(error, DataError | IntegrityError) or isinstance(cause, OverflowError | UnicodeError):
            raise Unwritable(f"{ledger} cannot hold a value: {_one_line(cause)}.") from error
        if getattr(cause, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
            raise Locked(f"{ledger} cannot be written yet: {_one_line(cause)}.") from error
        raise LedgerFault(f"{ledger} cannot be used: {_one_line(cause)}.") from error


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")

"""The connection to the ledger's database: transactions, and a check that the file is still the one that was opened.

A file that is deleted or replaced while it is open accepts every write, and nobody ever sees them. So the file's
identity is checked before and after each transaction. Knows no table but by name.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, text

from server.ledger.records import LedgerFault
from server.ledger.tables import KEYS, faults, migrate, name_of

__all__ = ["BUSY_SECONDS", "Database", "LedgerPart"]

BUSY_SECONDS: Final = 5.0
"""How long a write waits for another process's write."""
_LOCK_SECONDS: Final = 1.0
"""How long a request waits for a locked row of PostgreSQL. Other servers lock one for milliseconds."""
_PLACE = tuple[tuple[int, int], ...]


class Database:
    """A SQLite file or a PostgreSQL database, migrated to the current tables. Safe to use from several threads.

    Raises:
        LedgerFault: it cannot be opened or written, is damaged, or is of a newer version.
    """

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self._url, self._clock = url, clock
        self._lock = threading.Lock()
        self._name = ""
        with faults(""):
            self._name = name_of(make_url(url))
        with self._faults():
            self._file = _file_of(url)
            if self._file:
                # SQLite gives its other files the same mode. An existing file is not opened here, because closing it
                # would drop the locks of this process's other connections.
                with contextlib.suppress(OSError):  # opening it below reports the fault
                    os.close(os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._engine = _open(url, self._file)
            self._place: _PLACE = ()
            try:
                self._migrate()
            except BaseException:
                self._engine.dispose()
                raise

    def _faults(self) -> AbstractContextManager[None]:
        return faults(self._name)

    @property
    def kind(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Run one transaction that reads."""
        self._stay()
        with self._faults(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def report(self) -> Iterator[Connection]:
        """Run one long transaction that reads a consistent snapshot, without a time limit."""
        if self.kind == "sqlite":  # its reads are always snapshots
            with self.read() as connection:
                yield connection
            return
        with (
            faults(self._name),
            self._engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection,
        ):
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Run one transaction that writes. It locks at its start: two that read before they write could deadlock."""
        self._stay()
        with (
            faults(self._name),
            self._engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection
        if self._look() != self._place:
            raise LedgerFault(f"the ledger's file {self._name} was deleted or replaced while it was written.")

    # -- the file ----------------------------------------------------------------------------------------------------

    def _look(self) -> _PLACE:
        """Return the identities of the file and its write-ahead log. Empty: there is none, or the ledger is no file."""
        if self._file is None:
            return ()
        try:
            found = os.stat(self._file)
        except OSError:
            return ()
        place = [(found.st_dev, found.st_ino)] if found.st_size else []
        with contextlib.suppress(OSError):
            log = os.stat(self._file + "-wal")
            place.append((log.st_dev, log.st_ino))
        return tuple(place)

    def _stay(self) -> None:
        """Check that the path still leads to the open file. Reopen it if it was replaced by a file with keys.

        Raises:
            LedgerFault: the file is gone, or was replaced by one without keys.
        """
        if self._look() == self._place:
            return
        with self._lock:
            if self._look() == self._place:
                return
            assert self._file is not None
            if not os.path.exists(self._file):
                raise LedgerFault(f"the ledger's file {self._name} is gone: put it back, or start the server again.")
            self._engine.dispose()  # this also writes a deleted write-ahead log into its file
            if not self._has_keys(self._file):
                self._engine.dispose()
                raise LedgerFault(
                    f"the ledger's file {self._name} was replaced by one without keys: put the old one back, or start "
                    "again."
                )
            self._migrate()

    def _has_keys(self, file: str) -> bool:
        try:
            if not os.path.getsize(file):
                return False  # opening it would create a database
            with self._faults(), self._engine.connect() as connection:
                return connection.execute(select(KEYS.c.id)).first() is not None
        except (LedgerFault, OSError):
            return False

    def _migrate(self) -> None:
        with (
            faults(self._name),
            self._engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            migrate(connection, self._clock)
        self._place = self._look()


class LedgerPart:
    """What the parts of a ledger share. `_clock`: returns Unix seconds."""

    _database: Database
    _clock: Callable[[], float]


def _file_of(url: str) -> str | None:
    """Return the file of a SQLite database; None for other databases, one in memory, or a URL with options."""
    parsed = make_url(url)
    file = parsed.database
    if parsed.get_backend_name() != "sqlite" or parsed.query or not file or file.startswith("file:"):
        return None
    return None if file == ":memory:" else str(Path(file).absolute())


def _open(url: str, file: str | None) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, connect_args=_patience(url))
    if file is None:
        engine = create_engine(url)
    else:
        # Opening must not create a file: in place of a deleted one it would be a ledger without keys.
        where = f"{Path(file).as_uri()}?mode=rw"
        engine = create_engine(url, creator=lambda: sqlite3.connect(where, uri=True, check_same_thread=False))

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions itself
        for line in (
            f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}",
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = FULL",  # a settled request survives a power cut
            "PRAGMA foreign_keys = ON",
        ):
            connection.execute(line)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _patience(url: str) -> dict[str, Any]:
    """Return PostgreSQL's timeouts, except those that the URL sets.

    A lock held by another process, or a host that is gone, must not block every key's requests. And a server that is
    stopped within a transaction must not block the others: the database ends that transaction.
    """
    wait = 2 * int(BUSY_SECONDS * 1000)
    ends = {"lock": int(_LOCK_SECONDS * 1000), "statement": wait, "idle_in_transaction_session": wait}
    wanted = {
        "connect_timeout": int(BUSY_SECONDS),
        "tcp_user_timeout": wait,
        "keepalives_idle": int(BUSY_SECONDS),
        "options": " ".join(f"-c {name}_timeout={end}" for name, end in ends.items()),
    }
    given = make_url(url).query
    return {name: value for name, value in wanted.items() if name not in given}

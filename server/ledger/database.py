"""The connection to the books: transactions, and the file that they must go to. Knows no table but by name.

A file that is deleted or replaced while it is open takes every write and shows it to nobody. So the file's identity is
looked at before and after each transaction.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, text

from server.ledger.records import LedgerFault
from server.ledger.tables import KEYS, faults, migrate

__all__ = ["BUSY_SECONDS", "Database", "LedgerPart"]

BUSY_SECONDS: Final = 5.0
"""How long a write waits for another process's."""
_LOCK_SECONDS: Final = 1.0
"""How long a row of PostgreSQL's is waited for, by every key's requests: other servers lock one for milliseconds."""
_PLACE = tuple[tuple[int, int], ...]


class Database:
    """SQLite's file or PostgreSQL, with tables of today. Safe to use from several threads.

    Raises:
        LedgerFault: it cannot be opened or written, is damaged, or is of a newer version.
    """

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self._url, self._clock = url, clock
        self._lock = threading.Lock()
        with faults():
            self._file = _file_of(url)
            if self._file:
                # SQLite's other files take the mode. One that is there is not opened: closing it again would take away
                # the locks of this process's other connections.
                with contextlib.suppress(OSError):  # what is wrong with it is said when it is opened
                    os.close(os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._engine = _open(url, self._file)
            self._place: _PLACE = ()
            try:
                self._migrate()
            except BaseException:
                self._engine.dispose()
                raise

    @property
    def kind(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that reads."""
        self._stay()
        with faults(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def report(self) -> Iterator[Connection]:
        """One transaction that reads a lot: all of it as of one moment, for as long as it takes."""
        if self.kind == "sqlite":  # whose reading is always so
            with self.read() as connection:
                yield connection
            return
        with faults(), self._engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction, a writer's from the start: two that read first and write then could wait for each other."""
        self._stay()
        with faults(), self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection
        if self._look() != self._place:
            raise LedgerFault("the ledger's file was deleted or replaced while it was written.")

    # -- the file ----------------------------------------------------------------------------------------------------

    def _look(self) -> _PLACE:
        """What stands at the path: the file and its log of writes. Empty: nothing, or there is no file to look at."""
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
        """See that writes go where the path points: take up another file that has keys in it, refuse anything else."""
        if self._look() == self._place:
            return
        with self._lock:
            if self._look() == self._place:
                return
            assert self._file is not None
            if not os.path.exists(self._file):
                raise LedgerFault("the ledger's file is gone: put it back, or start the server again.")
            self._engine.dispose()  # a log of writes that was deleted is carried over to its file by this
            if not self._has_keys(self._file):
                self._engine.dispose()
                raise LedgerFault(
                    "the ledger's file was replaced by one without keys: put the old one back, or start again."
                )
            self._migrate()

    def _has_keys(self, file: str) -> bool:
        try:
            if not os.path.getsize(file):
                return False  # opening would make a database of it
            with faults(), self._engine.connect() as connection:
                return connection.execute(select(KEYS.c.id)).first() is not None
        except (LedgerFault, OSError):
            return False

    def _migrate(self) -> None:
        with faults(), self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            migrate(connection, self._clock)
        self._place = self._look()


class LedgerPart:
    """What the parts of a ledger share. `_clock`: returns Unix seconds."""

    _database: Database
    _clock: Callable[[], float]


def _file_of(url: str) -> str | None:
    """The file of a SQLite database; None for a server's, one in memory, or one with options of its own."""
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
        # Never made by opening: an empty file in the place of one that was deleted would be a ledger without keys.
        where = f"{Path(file).as_uri()}?mode=rw"
        engine = create_engine(url, creator=lambda: sqlite3.connect(where, uri=True, check_same_thread=False))

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
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
    """An end to waiting for PostgreSQL, where the URL does not say another: a lock that somebody else keeps, or a host
    that is gone, must not hold every key's requests. Nor may a server of ours that is stopped amid a transaction hold
    the others': the database ends that."""
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

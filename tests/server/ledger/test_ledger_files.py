"""What happens to a ledger's file: deleted, replaced, put back, read-only, on a disk that is full."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import begin, run
from fakes import FakeEngine, chat, make_app
from ledger_for_tests import Clock, row
from sqlalchemy import event

from server.accounts.charging import Meter
from server.accounts.location import in_use
from server.accounts.settling import Settler
from server.ledger.records import LedgerFault, NewKey
from server.ledger.store import Ledger
from server.settings import ServerSettings


def files(file: Path) -> list[Path]:
    """A database's: itself and what SQLite keeps beside it."""
    return [found for found in (file, Path(f"{file}-wal"), Path(f"{file}-shm")) if found.exists()]


def deleted(file: Path) -> None:
    for one in files(file):
        one.unlink()


def only_the_file_deleted(file: Path) -> None:
    file.unlink()


def moved_away(file: Path) -> None:
    file.rename(file.with_name("moved"))


def emptied(file: Path) -> None:
    deleted(file)
    file.touch()


def replaced_by_one_without_keys(file: Path) -> None:
    deleted(file)
    Ledger(f"sqlite:///{file}", Clock()).close()


def replaced_by_no_database(file: Path) -> None:
    deleted(file)
    file.write_bytes(b"this is no database" * 1000)


@pytest.mark.parametrize(
    "happens",
    [
        deleted, only_the_file_deleted, moved_away, emptied, replaced_by_one_without_keys, replaced_by_no_database,
    ],
)  # fmt: skip
def test_a_file_that_is_gone_takes_nothing(file_ledger: Ledger, file: Path, happens: Callable[[Path], None]) -> None:
    """It would be written into the void, and everybody served for nothing."""
    made = file_ledger.create_key("ada", balance=10)
    file_ledger.hold(made.key.id, "r", 1)
    happens(file)
    there = {one.name: one.read_bytes() for one in file.parent.iterdir() if one.name == file.name}
    for use in (
        lambda: file_ledger.authenticate(made.secret),
        lambda: file_ledger.hold(made.key.id, "s", 1),
        lambda: file_ledger.settle(row(made.key.id, "r", 1)),
        lambda: file_ledger.credit("ada", 1),
        file_ledger.beat,
    ):
        with pytest.raises(LedgerFault, match=r"gone|replaced"):
            use()
    assert {one.name: one.read_bytes() for one in file.parent.iterdir() if one.name == file.name} == there


def test_a_file_that_is_put_back_is_the_ledger_again(file_ledger: Ledger, file: Path) -> None:
    made = file_ledger.create_key("ada", balance=10)
    file_ledger.hold(made.key.id, "r", 5)
    moved_away(file)
    with pytest.raises(LedgerFault, match="gone"):
        file_ledger.settle(row(made.key.id, "r", 4))
    file.with_name("moved").rename(file)
    file_ledger.settle(row(made.key.id, "r", 4))
    assert (file_ledger.key("ada").balance, file_ledger.key("ada").held, file_ledger.check()) == (6, 0, [])
    with sqlite3.connect(file) as other:
        assert other.execute("SELECT balance FROM keys").fetchall() == [(6,)]


def test_a_copy_in_its_place_is_taken_up(file_ledger: Ledger, file: Path) -> None:
    """From a backup: what runs is charged there, although its hold is not in it."""
    made = file_ledger.create_key("ada", balance=10)
    with sqlite3.connect(file) as source, sqlite3.connect(file.with_name("backup")) as backup:
        source.backup(backup)
    file_ledger.hold(made.key.id, "r", 5)
    deleted(file)
    file.with_name("backup").rename(file)
    file_ledger.settle(row(made.key.id, "r", 4))
    assert (file_ledger.key("ada").balance, file_ledger.key("ada").held, file_ledger.check()) == (6, 0, [])


def test_a_log_of_writes_that_was_deleted_loses_nothing(file_ledger: Ledger, file: Path) -> None:
    made = file_ledger.create_key("ada", balance=10)
    file_ledger.hold(made.key.id, "r", 5)
    Path(f"{file}-wal").unlink()
    file_ledger.settle(row(made.key.id, "r", 4))
    with sqlite3.connect(file) as other:
        assert other.execute("SELECT balance, held FROM keys").fetchall() == [(6, 0)]
    assert file_ledger.check() == []


def test_a_replacement_during_a_write_is_told(file_ledger: Ledger, file: Path) -> None:
    made = file_ledger.create_key("ada", balance=10)
    with pytest.raises(LedgerFault, match="while it was written"), file_ledger._database.write():
        deleted(file)
    assert made.key.balance == 10


# -- over HTTP --------------------------------------------------------------------------------------------------------


class Served:
    """An application over a ledger in a file."""

    def __init__(self, file: Path) -> None:
        self.ledger = Ledger(f"sqlite:///{file}", Clock())
        self.meter = Meter(self.ledger, {}, Clock())
        self.app = make_app(FakeEngine(), meter=self.meter)
        self.key: NewKey = self.ledger.create_key("ada", balance=1000)

    def status(self, path: str = "") -> int:
        async def ask() -> int:
            headers = [(b"authorization", f"Bearer {self.key.secret}".encode())]
            how = {"path": path} if path else {"body": chat()}
            return int((await begin(self.app, headers=headers, **how).ended()).status)

        return int(run(ask()))

    def close(self) -> None:
        self.meter.close()


@pytest.fixture
def served(file: Path) -> Iterator[Served]:
    made = Served(file)
    yield made
    made.close()


def test_a_deleted_file_is_a_503_and_told_until_it_is_back(
    served: Served, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (served.status(), served.status("/health/ready")) == (200, 200)
    moved_away(file)
    assert (served.status(), served.status("/health/ready"), served.status("/health/live")) == (503, 503, 200)
    assert "requests are refused" in caplog.text
    assert "gone" in caplog.text
    assert not file.exists(), "nothing is begun in its place"
    file.with_name("moved").rename(file)
    assert (served.status(), served.status("/health/ready")) == (200, 200)
    assert "can be used again" in caplog.text


def full(ledger: Ledger) -> Callable[[], None]:
    """Let the disk be full for a ledger until the returned function is called: SQLite's own bound on pages."""
    with ledger._database._engine.connect() as connection:
        pages = int(connection.exec_driver_sql("PRAGMA page_count").scalar() or 0)

    def bound(most: int) -> None:
        with ledger._database._engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {most}")

    bound(pages)
    return lambda: bound(10**6)


def test_a_full_disk_serves_nobody_for_nothing(file_ledger: Ledger) -> None:
    """What cannot be settled waits, its hold stands; with room again all is written, once."""
    desk = Settler(file_ledger)
    key = file_ledger.create_key("ada", balance=10**6).key
    mend = full(file_ledger)
    held: list[str] = []

    def fill() -> None:
        while True:
            name = f"request-{len(held):050}"
            desk.hold(key.id, name, 10)
            held.append(name)

    with pytest.raises(LedgerFault, match="full"):
        fill()
    for name in held:
        desk.settle(row(key.id, name, 7, model="m" * 200))
    assert desk.waiting, "rows are longer than holds: some of them find no room"
    waits = desk.waiting
    assert file_ledger.check() == []
    with pytest.raises(LedgerFault, match="full"):
        desk.hold(key.id, "more", 10)
    mend()
    desk.beat()
    assert desk.waiting == 0 < waits
    balance = file_ledger.key("ada").balance
    assert (balance, file_ledger.key("ada").held, file_ledger.check()) == (10**6 - 7 * len(held), 0, [])


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder on a file system of one megabyte."""
    with tempfile.TemporaryDirectory() as folder:
        made = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(made, capture_output=True, check=False).returncode:
            pytest.skip("no small file system can be mounted here")
        yield Path(folder)
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    ledger = Ledger(f"sqlite:///{small_disk / 'ledger.db'}", Clock())
    desk = Settler(ledger)
    key = ledger.create_key("ada", balance=10**6).key
    desk.hold(key.id, "r", 10)

    def fill() -> None:
        with open(small_disk / "other", "wb", buffering=0) as other:
            while True:
                other.write(b"x" * 512)

    def hold() -> None:
        for number in range(1000):
            desk.hold(key.id, f"s{number}", 10)

    with pytest.raises(OSError, match="space"):
        fill()
    with pytest.raises(LedgerFault):
        hold()
    desk.settle(row(key.id, "r", 7))
    assert desk.waiting
    (small_disk / "other").unlink()
    desk.beat()
    assert desk.waiting == 0
    assert ledger.usage()[0]["requests"] == 1
    assert ledger.check() == []
    ledger.close()


# -- read-only --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """For a user whom permissions bind, which they do not bind root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("folder_too", [False, True])
def test_a_read_only_ledger_is_one_sentence(folder_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a user who may read it: nothing is served that cannot be written down."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        ledger = Ledger(f"sqlite:///{folder}/verbatim.db", Clock())
        ledger.create_key("ada")
        ledger.close()
        os.chmod(f"{folder}/verbatim.db", 0o444)
        os.chmod(folder, 0o555 if folder_too else 0o777)
        with as_nobody(), pytest.raises(LedgerFault, match=r"verbatim\.db cannot be used: .*(readonly|unable to open)"):
            in_use(ServerSettings(), None)
        os.chmod(folder, 0o755)


def test_a_ledger_that_becomes_read_only_serves_nobody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that an error has made read-only, in the middle of the day."""
    assert served.status() == 200

    def read_only(connection: Any, _: Any = None) -> None:
        connection.execute("PRAGMA query_only = ON")

    event.listen(served.ledger._database._engine, "connect", read_only)
    served.ledger._database._engine.dispose()
    assert (served.status(), served.status("/health/live")) == (503, 200)
    event.remove(served.ledger._database._engine, "connect", read_only)
    served.ledger._database._engine.dispose()
    assert served.status() == 200
    assert served.ledger.check() == []

"""The ledger adds up: whatever is held, settled, credited or crashed, nothing is lost, doubled or overdrawn."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule
from ledger_for_tests import WITH_POSTGRES, Clock, empty_postgres, row

from engine import Usage, VerbatimError
from server.ledger import reports
from server.ledger.records import Key, LedgerFault, Limits, NoBalance, Prices, UnknownKey, cost_of
from server.ledger.reports import as_key
from server.ledger.store import Ledger

# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_opens_until_it_is_revoked_or_expires(ledger: Ledger, clock: Clock) -> None:
    lasting = ledger.create_key("lasting")
    clock.now += 1
    brief = ledger.create_key("brief", expires=clock.now + 60)
    assert ledger.authenticate(lasting.secret) == lasting.key
    assert ledger.authenticate(brief.secret) == brief.key
    clock.now += 60
    assert ledger.authenticate(brief.secret) is None
    assert ledger.revoke("lasting").revoked == clock.now
    assert ledger.authenticate(lasting.secret) is None
    assert [key.name for key in ledger.all_keys()] == ["lasting", "brief"]


@pytest.mark.parametrize("secret", ["", "vk-", "x" * 10_000, "\x00", "'; DROP TABLE keys; --", "\ud800", "é"])
def test_anything_else_opens_nothing(ledger: Ledger, secret: str) -> None:
    made = ledger.create_key("a")
    assert ledger.authenticate(secret) is None
    assert ledger.authenticate(made.secret + "x") is None
    assert ledger.authenticate(made.secret[:-1]) is None
    assert ledger.authenticate(made.key.id) is None


def test_the_secret_is_nowhere(ledger: Ledger, tmp_path: Path) -> None:
    made = ledger.create_key("a")
    ledger.close()
    for file in tmp_path.iterdir():
        assert made.secret.encode() not in file.read_bytes()
    assert made.secret not in repr(ledger.all_keys())
    assert len(made.secret) >= 43  # 256 bits


def test_the_file_is_its_owner_s_alone(file_ledger: Ledger, tmp_path: Path) -> None:
    assert {stat.S_IMODE(os.stat(file).st_mode) for file in tmp_path.iterdir()} == {0o600}


def test_names_are_unique_and_found(ledger: Ledger) -> None:
    made = ledger.create_key("a", models=["m"], limits=Limits(1, 2, 3, 4), balance=5)
    assert ledger.key("a") == ledger.key(made.key.id) == made.key
    assert (made.key.models, made.key.limits, made.key.balance) == (("m",), Limits(1, 2, 3, 4), 5)
    with pytest.raises(VerbatimError, match="already"):
        ledger.create_key("a")
    with pytest.raises(UnknownKey, match="'b'"):
        ledger.key("b")
    assert ledger.limit("a", Limits(concurrent=9)).limits == Limits(concurrent=9)
    assert ledger.key("a").models == ("m",)
    assert ledger.limit("a", Limits(), models=[]).models == ()


# -- money ------------------------------------------------------------------------------------------------------------


def test_hold_and_settle(ledger: Ledger) -> None:
    key = ledger.create_key("a", balance=100).key
    ledger.hold(key.id, "r1", 60)
    with pytest.raises(NoBalance, match="has 40 left, and this request may cost 41") as refused:
        ledger.hold(key.id, "r2", 41)
    assert refused.value.details == {"available": 40, "needed": 41}
    ledger.hold(key.id, "r3", 40)
    ledger.settle(row(key.id, "r1", 10))
    assert (ledger.key("a").balance, ledger.key("a").held) == (90, 40)
    ledger.settle(row(key.id, "r1", 10))  # twice is once
    ledger.release("r1")
    ledger.release("r3")
    ledger.release("r3")
    assert (ledger.key("a").balance, ledger.key("a").held) == (90, 0)
    [used] = ledger.usage()
    assert (used["requests"], used["cost"], used["completion_tokens"]) == (1, 10, 4)
    assert ledger.check() == []


def test_a_cost_never_exceeds_its_hold(ledger: Ledger) -> None:
    key = ledger.create_key("a", balance=10).key
    ledger.hold(key.id, "r", 10)
    ledger.settle(row(key.id, "r", 11))
    assert ledger.key("a").balance == 0
    assert ledger.check() == []


def test_a_key_without_balance_is_recorded_and_not_charged(ledger: Ledger) -> None:
    key = ledger.create_key("a").key
    ledger.hold(key.id, "r", 10**12)
    ledger.settle(row(key.id, "r", 7))
    assert ledger.key("a").balance is None
    assert ledger.usage()[0]["cost"] == 0
    ledger.credit("a", 5)
    assert ledger.key("a").balance == 5
    assert ledger.check() == []


def test_taking_away_stops_at_what_is_held(ledger: Ledger) -> None:
    key = ledger.create_key("a", balance=10).key
    ledger.hold(key.id, "r", 4)
    with pytest.raises(NoBalance, match="6 to take away, not 7"):
        ledger.credit("a", -7)
    assert ledger.credit("a", -6).balance == 4
    with pytest.raises(VerbatimError, match="negative"):
        ledger.create_key("b", balance=-1)


def test_a_revoked_key_holds_nothing_more(ledger: Ledger) -> None:
    key = ledger.create_key("a", balance=10).key
    ledger.hold(key.id, "r", 4)
    ledger.revoke("a")
    with pytest.raises(UnknownKey, match="revoked"):
        ledger.hold(key.id, "s", 1)
    ledger.settle(row(key.id, "r", 4))
    assert ledger.key("a").balance == 6


def test_the_holds_of_another_are_released_and_its_settlement_is_charged_all_the_same(
    ledger: Ledger, url: str, clock: Clock
) -> None:
    key = ledger.create_key("a", balance=10).key
    ledger.beat()
    ledger.hold(key.id, "lost", 4)
    other = Ledger(url, clock)
    other.hold(key.id, "mine", 3)
    [(owner, beats)] = other.beat()[0].items()
    assert owner == ledger.owner
    ledger.beat()
    assert other.release_owner(owner, beats) == 0, "it has said since that it lives"
    assert other.key("a").held == 7
    assert other.release_owner(owner, other.beat()[0][owner]) == 1
    assert other.key("a").held == 3
    assert ledger.settle(row(key.id, "lost", 4)) == 0  # it was not gone after all
    ledger.settle(row(key.id, "lost", 4))  # twice is once
    assert (other.key("a").balance, other.key("a").held) == (6, 3)
    assert [found["cost"] for found in other.usage()] == [4]
    other.hold(key.id, "third", 3)
    assert ledger.settle(row(key.id, "lost too", 5)) == 5, "what others hold is theirs: it is recorded as unpaid"
    assert (other.key("a").balance, other.check()) == (6, [])
    assert [found["requests"] for found in other.usage()] == [2]
    other.close()


def test_usage_by_day_and_model(ledger: Ledger) -> None:
    a, b = (ledger.create_key(name, balance=1000).key for name in "ab")
    day = 86400.0
    for i, (key, model, ended) in enumerate([(a, "m", 0), (a, "m", 1), (a, "n", day), (b, "m", 2 * day)]):
        ledger.hold(key.id, str(i), 10)
        ledger.settle(row(key.id, str(i), 10, model=model, ended=20_000 * day + ended))
    assert [(r["key"], r["model"], r["requests"]) for r in ledger.usage(by="model")] == [
        ("a", "m", 2), ("a", "n", 1), ("b", "m", 1),
    ]  # fmt: skip
    assert [(r["key"], r["day"], r["cost"]) for r in ledger.usage(by="day")] == [
        ("a", "2024-10-04", 20), ("a", "2024-10-05", 10), ("b", "2024-10-06", 10),
    ]  # fmt: skip
    assert [r["requests"] for r in ledger.usage(key="a", since=20_001 * day)] == [1]
    assert ledger.usage(key="b", since=20_003 * day) == []


def test_the_price_of_cached_tokens() -> None:
    usage = Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4)
    assert cost_of(usage, Prices()) == 15
    assert cost_of(usage, Prices(prompt=10, cached_prompt=1, completion=100)) == 60 + 4 + 500


# -- many at once -----------------------------------------------------------------------------------------------------


def _spend(url: str, key_id: str, prefix: str, taken: list[int] | None = None) -> int:
    ledger = Ledger(url, Clock())
    count = 0
    for i in range(40):
        try:
            ledger.hold(key_id, f"{prefix}-{i}", 3)
        except NoBalance:
            continue
        count += 1
        if i % 3 == 0:
            ledger.release(f"{prefix}-{i}")
            count -= 1
        else:
            ledger.settle(row(key_id, f"{prefix}-{i}", 3))
    ledger.close()
    if taken is not None:
        taken.append(count)
    return count


def test_threads_and_processes_cannot_overdraw(ledger: Ledger, url: str) -> None:
    key = ledger.create_key("a", balance=200).key
    taken: list[int] = []
    threads = [threading.Thread(target=_spend, args=(url, key.id, f"t{i}", taken)) for i in range(4)]
    for thread in threads:
        thread.start()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        counts = pool.starmap(_spend, [(url, key.id, f"p{i}") for i in range(2)])
    for thread in threads:
        thread.join()
    left = ledger.key("a")
    assert (left.balance, left.held) == (200 - 3 * (sum(taken) + sum(counts)), 0)
    assert 0 <= (left.balance or 0) < 3
    assert ledger.check() == []


class Money(RuleBasedStateMachine):
    """Random holds, settlements, releases, credits and crashes against a model of plain integers."""

    requests = Bundle("requests")

    def fresh(self) -> str:
        """The URL of an empty database."""
        return f"sqlite:///{self.folder.name}/ledger.sqlite3"

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = tempfile.TemporaryDirectory()
        self.url = self.fresh()
        self.ledger = Ledger(self.url, self.clock)
        self.balance = 50
        self.key = self.ledger.create_key("k", balance=50).key
        self.holds: dict[str, int] = {}
        self.settled: set[str] = set()
        self.number = 0

    @rule(target=requests, amount=st.integers(0, 60))
    def hold(self, amount: int) -> object:
        self.number += 1
        name = f"r{self.number}"
        if amount <= self.balance - sum(self.holds.values()):
            self.ledger.hold(self.key.id, name, amount)
            self.holds[name] = amount
            return name
        with pytest.raises(NoBalance):
            self.ledger.hold(self.key.id, name, amount)
        return multiple()

    @rule(name=requests, cost=st.integers(0, 80))
    def settle(self, name: str, cost: int) -> None:
        self.ledger.settle(row(self.key.id, name, cost))
        if name not in self.settled:
            self.settled.add(name)
            free = self.balance - sum(self.holds.values())
            used = min(cost, self.holds.pop(name, free))
            self.balance -= used

    @rule(name=requests)
    def release(self, name: str) -> None:
        self.ledger.release(name)
        self.holds.pop(name, None)

    @rule(amount=st.integers(-30, 30))
    def credit(self, amount: int) -> None:
        if self.balance - sum(self.holds.values()) + amount < 0:
            with pytest.raises(NoBalance):
                self.ledger.credit(self.key.id, amount)
        else:
            self.ledger.credit(self.key.id, amount)
            self.balance += amount

    @rule()
    def crash(self) -> None:
        """The process is gone and another one opens the same database."""
        fresh = Ledger(self.url, self.clock)
        self.ledger.close()
        self.ledger = fresh
        for owner, beats in self.ledger.beat()[0].items():
            self.ledger.release_owner(owner, beats)
        self.holds.clear()

    @invariant()
    def adds_up(self) -> None:
        key = self.ledger.key(self.key.id)
        assert (key.balance, key.held) == (self.balance, sum(self.holds.values()))
        assert 0 <= key.held <= (key.balance or 0)
        assert self.ledger.check() == []

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()


TestMoney = Money.TestCase
TestMoney.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


class PostgresMoney(Money):
    """The same against PostgreSQL."""

    def fresh(self) -> str:
        return empty_postgres()


TestPostgresMoney = WITH_POSTGRES(PostgresMoney.TestCase)
TestPostgresMoney.settings = settings(max_examples=10, stateful_step_count=30, deadline=None)


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_refused(file: Path, tmp_path: Path, clock: Clock) -> None:
    file.write_bytes(b"this is no database, only a long enough text to look at" * 100)
    with pytest.raises(LedgerFault, match="not a database"):
        Ledger(f"sqlite:///{file}", clock)
    with pytest.raises(LedgerFault, match="unable to open"):
        Ledger(f"sqlite:///{tmp_path / 'nowhere' / 'x.sqlite3'}", clock)


def test_a_newer_database_is_refused(file_ledger: Ledger, file: Path, file_url: str, clock: Clock) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("INSERT INTO migrations VALUES ('9999-future', 0)")
    with pytest.raises(LedgerFault, match="9999-future"):
        Ledger(file_url, clock)


def test_a_locked_database_is_told_and_nothing_changes(
    file_ledger: Ledger, file: Path, file_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.ledger.database.BUSY_SECONDS", 0.2)
    impatient = Ledger(file_url, Clock())
    key = file_ledger.create_key("a", balance=10).key
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerFault, match="locked"):
            impatient.hold(key.id, "r", 5)
        other.execute("ROLLBACK")
    assert impatient.key("a").held == 0
    impatient.hold(key.id, "r", 5)
    impatient.close()


def test_a_full_disk_is_told_and_nothing_changes(file_ledger: Ledger, file_url: str, clock: Clock) -> None:
    key = file_ledger.create_key("a", balance=10**6).key
    file_ledger.close()
    small = Ledger(file_url, clock)
    with small._database._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    held: list[int] = []

    def fill() -> None:
        for i in range(10_000):
            small.hold(key.id, f"request-{i:050}", 1)
            held.append(i)

    with pytest.raises(LedgerFault, match="full"):
        fill()
    assert small.key("a").held == len(held)
    assert small.check() == []
    small.close()


def test_messages_hold_no_statement(file_ledger: Ledger, file: Path) -> None:
    made = file_ledger.create_key("a")
    with sqlite3.connect(file) as connection:
        connection.execute("DROP TABLE holds")
    with pytest.raises(LedgerFault) as raised:
        file_ledger.hold(made.key.id, "r", 1)
    assert "INSERT" not in raised.value.message
    assert "SELECT" not in raised.value.message


def test_the_books_are_checked_as_of_one_moment(ledger: Ledger, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a server that works, what is settled amid the check is no error in the ledger."""
    key = ledger.create_key("ada", balance=100).key
    other = Ledger(url, Clock())
    other.hold(key.id, "r", 10)

    def meanwhile(found: Any) -> Key:
        other.settle(row(key.id, "r", 7))
        return as_key(found)

    monkeypatch.setattr(reports, "as_key", meanwhile)
    assert ledger.check() == []
    assert ledger.key("ada").balance == 93
    other.close()

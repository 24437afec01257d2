"""Settling under faults: rows that cannot be written, answers that are lost, servers that stop."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ledger_for_tests import WITH_POSTGRES, Clock, empty_postgres, query, row

from server.accounts.settling import Settler
from server.ledger.records import LedgerFault, NoBalance, Settled
from server.ledger.store import Ledger

SILENCE = 7
"""Beats of one server after which another that does not beat is taken for dead."""


def settler(ledger: Ledger) -> Settler:
    """One that can ask for no other process."""
    return Settler(ledger, gone=lambda _: False)


# -- rows that a database does not take -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"finish_reason": ",".join(["length"] * 100)},
        {"model": "m" * 5000},
        {"fingerprint": "f" * 500},
        {"model": "a\x00b"},
        {"model": "a\ud800b"},
        {"prompt_tokens": 2**31, "completion_tokens": 2**40, "cached_tokens": 2**31, "reasoning_tokens": 2**31},
        {"prompt_tokens": 2**64},
        {"cost": 2**70},
        {"seed": 2**200},
        {"request_id": "r" * 200},
    ],
    ids=[
        "many choices",
        "long model",
        "long fingerprint",
        "NUL",
        "surrogate",
        "tokens",
        "64 bits",
        "cost",
        "seed",
        "id",
    ],
)
def test_no_row_stands_before_others(ledger: Ledger, fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """It is recorded or set aside; it is charged once, and another key, and this one, go on."""
    desk = settler(ledger)
    ada, bob = (ledger.create_key(name, balance=100).key for name in ("ada", "bob"))
    ended = row(ada.id, **{"request_id": "r", "cost": 7, **fields})
    desk.hold(ada.id, ended.request_id, 10)
    with caplog.at_level(logging.CRITICAL):
        desk.settle(ended)
        desk.settle(ended)
    charged = min(ended.cost, 10)
    assert (ledger.key("ada").balance, ledger.key("ada").held) == (100 - charged, 0)
    desk.hold(bob.id, "s", 10)
    desk.hold(ada.id, "t", 10)
    recorded = query(ledger, "SELECT request_id FROM requests")
    aside = ledger.aside()
    assert len(recorded) + len(aside) == 1, "twice is once"
    assert ledger.check() == []
    if aside:
        assert json.loads(aside[0]["row"])["completion_tokens"] == ended.completion_tokens
        assert "set aside" in caplog.text
        desk.beat()
        assert desk.aside == 1
        ledger.aside(seen=True)
        desk.beat()
        assert desk.aside == 0


def test_the_table_takes_whatever_a_request_can_end_with(ledger: Ledger) -> None:
    """The table takes whatever a request can end with: setting aside is for what nobody foresaw."""
    key = ledger.create_key("ada", balance=100).key
    reasons = ",".join(["tool_calls"] * 128)
    ledger.hold(key.id, "r", 10)
    ledger.settle(row(key.id, "r", 7, finish_reason=reasons, model="m" * 2000, prompt_tokens=2**40))
    assert query(ledger, "SELECT finish_reason FROM requests") == [(reasons,)]
    assert ledger.aside() == []


def test_a_row_of_a_key_that_was_deleted_by_hand(ledger: Ledger) -> None:
    desk = settler(ledger)
    ada, bob = (ledger.create_key(name, balance=100).key for name in ("ada", "bob"))
    with ledger._database.write() as connection:
        connection.exec_driver_sql("DELETE FROM credits WHERE key_id = '" + ada.id + "'")
        connection.exec_driver_sql("DELETE FROM keys WHERE id = '" + ada.id + "'")
    desk.settle(row(ada.id, "r", 7))
    desk.hold(bob.id, "s", 10)
    assert [found["charged"] for found in ledger.aside()] == [0]


def test_a_row_that_can_nowhere_be_written_keeps_its_hold(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk = settler(ledger)
    key = ledger.create_key("ada", balance=100).key
    desk.hold(key.id, "r", 10)
    with ledger._database.write() as connection:  # no table takes anything
        connection.exec_driver_sql("UPDATE keys SET held = 3")
    desk.settle(row(key.id, "r", 7))
    assert "its hold stands" in caplog.text
    assert '"completion_tokens": 4' in caplog.text, "the log has it"
    assert ledger.key("ada").balance == 100
    desk.hold(key.id, "s", 10)


def test_a_key_whose_end_waits_is_alone_in_waiting(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of another's that is locked (PostgreSQL) is nobody else's trouble; its own key is served nothing more."""
    desk = settler(ledger)
    ada, bob = (ledger.create_key(name, balance=100).key for name in ("ada", "bob"))
    for key, name in ((ada, "r"), (bob, "s")):
        desk.hold(key.id, name, 10)
    really = ledger.settle

    def locked(given: Settled) -> int:
        if given.key_id == ada.id:
            raise LedgerFault("the ledger cannot be used: canceling statement due to lock timeout")
        return really(given)

    monkeypatch.setattr(ledger, "settle", locked)
    desk.settle(row(ada.id, "r", 7))
    desk.settle(row(bob.id, "s", 7))
    assert desk.hold(bob.id, "u", 10) == 10
    with pytest.raises(LedgerFault):
        desk.hold(ada.id, "t", 10)
    assert (ledger.key("ada").held, ledger.key("bob").balance) == (10, 93)
    assert desk.fault is None, "the ledger works"
    monkeypatch.undo()
    desk.beat()
    assert (ledger.key("ada").held, ledger.key("ada").balance) == (0, 93)


@WITH_POSTGRES
def test_a_locked_row_is_waited_for_once_in_a_beat(clock: Clock) -> None:
    """Each wait is everybody's: a hundred ends of one key are not a hundred waits, nor a fault of all."""
    ledger = Ledger(empty_postgres(), clock)
    desk = settler(ledger)
    ada, bob = (ledger.create_key(name, balance=1000).key for name in ("ada", "bob"))
    for i in range(5):
        desk.hold(ada.id, f"r{i}", 10)
    asked: list[str] = []
    really = ledger.settle

    def counted(given: Settled) -> int:
        asked.append(given.request_id)
        return really(given)

    ledger.settle = counted  # type: ignore[method-assign]
    with ledger._database._engine.connect() as other, other.begin():
        other.exec_driver_sql("SELECT id FROM keys WHERE name = 'ada' FOR UPDATE")
        for i in range(5):
            desk.settle(row(ada.id, f"r{i}", 7))
        with pytest.raises(LedgerFault):
            desk.hold(ada.id, "s", 10)
        assert (asked, desk.waiting, desk.fault) == (["r0"], 5, None)
        desk.hold(bob.id, "t", 10)
        desk.beat()
        assert (len(asked), desk.waiting) == (2, 5)
    desk.beat()
    assert (desk.waiting, ledger.key("ada").balance, ledger.key("ada").held) == (0, 1000 - 5 * 7, 0)
    ledger.close()


@WITH_POSTGRES
def test_a_server_that_is_stopped_amid_a_transaction_loses_its_locks(clock: Clock) -> None:
    ledger = Ledger(empty_postgres(), clock)
    [(ends,)] = query(ledger, "SHOW idle_in_transaction_session_timeout")
    ledger.close()
    assert ends == "10s"


def test_a_server_that_ends_without_its_database_tries_once(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Each try may take seconds, and there may be as many as requests ran."""
    desk = settler(ledger)
    key = ledger.create_key("ada", balance=1000).key
    for i in range(5):
        desk.hold(key.id, f"r{i}", 10)
    tried: list[str] = []

    def gone(*_: Any) -> Any:
        tried.append("")
        raise LedgerFault("the ledger cannot be used: connection refused")

    for verb in ("beat", "leave", "settle", "release"):
        setattr(ledger, verb, gone)
    for i in range(5):
        desk.settle(row(key.id, f"r{i}", 7))
    tried.clear()
    desk.close()
    assert len(tried) == 1
    assert caplog.text.count("not written: {") == 5, "the log has them"


# -- servers that are taken for dead ----------------------------------------------------------------------------------


def test_a_server_that_stands_still_loses_its_holds_and_not_its_money(ledger: Ledger, url: str, clock: Clock) -> None:
    """Whatever clocks say, of any machine: only beats count. A request that had lost its hold is charged, once."""
    stopped, other = settler(ledger), settler(Ledger(url, clock))
    key = ledger.create_key("ada", balance=10).key
    for desk in (stopped, other):
        desk.beat()
    stopped.hold(key.id, "r", 10)
    clock.now += 10 * 86400
    for _ in range(3 * SILENCE):
        stopped.beat()
        other.beat()
    assert ledger.key("ada").held == 10, "it lives"
    for _ in range(SILENCE):
        other.beat()
    assert ledger.key("ada").held == 0
    stopped.settle(row(key.id, "r", 7))
    stopped.settle(row(key.id, "r", 7))
    assert (ledger.key("ada").balance, ledger.usage()[0]["requests"], ledger.check()) == (3, 1, [])
    stopped.beat()
    assert len(other._ledger.beat()[0]) == 1, "it is known again"
    other._ledger.close()


def test_an_outage_of_the_database_makes_nobody_dead(
    ledger: Ledger, url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = settler(ledger), settler(Ledger(url, clock))
    key = ledger.create_key("ada", balance=10).key
    for desk in (one, other):
        desk.beat()
    one.hold(key.id, "r", 10)
    with monkeypatch.context() as patched:

        def broken(*_: Any) -> None:
            raise LedgerFault("the ledger cannot be used: connection refused")

        for desk in (one, other):
            patched.setattr(desk._ledger, "beat", broken)
        for _ in range(3 * SILENCE):
            other.beat()
        assert other.fault is not None
    other.beat()
    assert other.fault is None
    assert ledger.key("ada").held == 10
    other._ledger.close()


# -- a random walk ----------------------------------------------------------------------------------------------------


class FlakyLedger(Ledger):
    """Its next writes fail: before they begin, or after they were committed, when only the answer is lost."""

    def __init__(self, *arguments: Any) -> None:
        self.plan: list[str] = []
        super().__init__(*arguments)
        really = self._database.write

        @contextmanager
        def write() -> Iterator[Any]:
            fault = self.plan.pop(0) if self.plan else ""
            if fault == "before":
                raise LedgerFault("the ledger cannot be used: database or disk is full")
            with really() as connection:
                yield connection
            if fault == "after":
                raise LedgerFault("the ledger cannot be used: server closed the connection unexpectedly")

        self._database.write = write  # type: ignore[method-assign]


def test_a_hold_whose_answer_was_lost_is_released(url: str) -> None:
    ledger = FlakyLedger(url, Clock())
    desk = settler(ledger)
    key = ledger.create_key("ada", balance=10).key
    ledger.plan = ["after"]
    with pytest.raises(LedgerFault):
        desk.hold(key.id, "r", 10)
    assert ledger.key("ada").held == 10
    assert desk.hold(key.id, "s", 10) == 10, "the first is released before"
    ledger.plan = ["after"]  # the settlement is written, and nobody knows it
    desk.settle(row(key.id, "s", 4))
    desk.beat()
    assert (ledger.key("ada").balance, ledger.key("ada").held, desk.waiting) == (6, 0, 0)
    ledger.close()


@dataclass
class Server:
    """One of the servers that share the ledger."""

    ledger: FlakyLedger
    desk: Settler
    running: dict[str, str] = field(default_factory=dict)  # requests and their keys


class Faults(RuleBasedStateMachine):
    """Two servers, two keys, and everything that goes wrong. After each step the ledger adds up."""

    def fresh(self) -> str:
        """The URL of an empty database."""
        return f"sqlite:///{self.folder.name}/ledger.sqlite3"

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.url = self.fresh()
        self.shared = Ledger(self.url, Clock())
        self.keys = [self.shared.create_key(name, balance=200).key.id for name in ("ada", "bob")]
        self.credits = dict.fromkeys(self.keys, 200)
        self.owed: dict[str, int] = {}  # requests that were ended by a server that went on: their cost
        self.number = 0
        self.dead: set[str] = set()
        self.servers = [self.start(), self.start()]

    def start(self) -> Server:
        self.number += 1
        ledger = FlakyLedger(self.url, Clock(), f"server-{self.number}")
        desk = Settler(ledger, gone=lambda owner: owner in self.dead)
        desk.beat()
        return Server(ledger, desk)

    @rule(which=st.integers(0, 1), key=st.integers(0, 1), amount=st.integers(0, 120))
    def hold(self, which: int, key: int, amount: int) -> None:
        self.number += 1
        server, name = self.servers[which], f"r{self.number}"
        try:
            server.desk.hold(self.keys[key], name, amount)
        except (NoBalance, LedgerFault):
            return
        server.running[name] = self.keys[key]

    @rule(which=st.integers(0, 1), cost=st.integers(0, 60), text=st.sampled_from(["stop", "stop," * 40, "\ud800"]))
    def end(self, which: int, cost: int, text: str) -> None:
        server = self.servers[which]
        if server.running:
            name, key = server.running.popitem()
            held = query(self.shared, f"SELECT amount FROM holds WHERE request_id = '{name}'")
            self.owed[name] = min([cost, *(one[0] for one in held)])
            server.desk.settle(row(key, name, self.owed[name], finish_reason=text))

    @rule(which=st.integers(0, 1))
    def release(self, which: int) -> None:
        server = self.servers[which]
        if server.running:
            name, key = server.running.popitem()
            server.desk.release(key, name)

    @rule(which=st.integers(0, 1), plan=st.lists(st.sampled_from(["before", "after", ""]), min_size=1, max_size=4))
    def fail(self, which: int, plan: list[str]) -> None:
        self.servers[which].ledger.plan = plan

    @rule(which=st.integers(0, 1))
    def stand_still(self, which: int) -> None:
        """One server stops for so long that the other takes it for dead. Then it goes on."""
        for _ in range(SILENCE):
            self.servers[1 - which].desk.beat()

    @rule(which=st.integers(0, 1))
    def beat(self, which: int) -> None:
        self.servers[which].desk.beat()

    @precondition(lambda self: self.number < 60)
    @rule(which=st.integers(0, 1))
    def kill(self, which: int) -> None:
        """What waited with it is lost: its holds are released, and cost nobody anything."""
        server = self.servers[which]
        self.dead.add(server.ledger.owner)
        for name in server.desk._waiting:
            self.owed.pop(name, None)
        server.ledger.close()
        self.servers[which] = self.start()

    @rule(key=st.integers(0, 1), amount=st.integers(-50, 50))
    def credit(self, key: int, amount: int) -> None:
        try:
            self.shared.credit(self.keys[key], amount)
        except NoBalance:
            return
        self.credits[self.keys[key]] += amount

    @invariant()
    def adds_up(self) -> None:
        assert self.shared.check() == []
        ended = dict(query(self.shared, "SELECT request_id, cost + unpaid FROM requests"))
        aside = dict(query(self.shared, "SELECT request_id, charged FROM set_aside"))
        assert not set(ended) & set(aside), "charged twice"
        for name, cost in ended.items():
            assert cost == self.owed.get(name, cost)
        for name, cost in aside.items():
            assert cost <= self.owed.get(name, cost)
        spent = dict(query(self.shared, "SELECT key_id, SUM(cost) FROM requests GROUP BY key_id"))
        beside = dict(query(self.shared, "SELECT key_id, SUM(charged) FROM set_aside GROUP BY key_id"))
        for key in self.shared.all_keys():
            assert key.balance == self.credits[key.id] - spent.get(key.id, 0) - beside.get(key.id, 0)
            assert 0 <= key.held <= (key.balance or 0)

    @invariant()
    def every_hold_has_an_owner(self) -> None:
        known = {server.ledger.owner: server for server in self.servers}
        for name, owner in query(self.shared, "SELECT request_id, owner FROM holds"):
            if owner not in self.dead:
                assert name in known[owner].running or name in known[owner].desk._waiting, name

    def teardown(self) -> None:
        if not hasattr(self, "servers"):
            return
        for server in self.servers:
            server.ledger.plan = []
            for name, key in server.running.items():
                server.desk.release(key, name)
        for _ in range(SILENCE + 1):
            for server in self.servers:
                server.desk.beat()
        self.adds_up()
        assert [server.desk.waiting for server in self.servers] == [0, 0]
        assert [key.held for key in self.shared.all_keys()] == [0, 0], "a hold that nobody owns"
        found = {
            one[0]
            for table in ("requests", "set_aside")
            for one in query(self.shared, f"SELECT request_id FROM {table}")
        }
        assert found >= set(self.owed), "served for nothing"
        for server in self.servers:
            server.ledger.close()
        self.shared.close()
        self.folder.cleanup()


TestFaults = Faults.TestCase
TestFaults.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)


class PostgresFaults(Faults):
    """The same against PostgreSQL."""

    def fresh(self) -> str:
        return empty_postgres()


TestPostgresFaults = WITH_POSTGRES(PostgresFaults.TestCase)
TestPostgresFaults.settings = settings(max_examples=10, stateful_step_count=30, deadline=None)

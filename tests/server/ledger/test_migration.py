"""A ledger of the first release, with its money, becomes one of today and takes what it refused."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from ledger_for_tests import Clock, query, row
from sqlalchemy import create_engine

from server.accounts.settling import Settler
from server.ledger.records import Limits
from server.ledger.store import Ledger

FIRST = """
CREATE TABLE migrations (name VARCHAR(64) NOT NULL, at FLOAT, PRIMARY KEY (name));
CREATE TABLE keys (
    id VARCHAR(32) NOT NULL, name VARCHAR(200) NOT NULL, hash VARCHAR(64) NOT NULL, shown VARCHAR(16) NOT NULL,
    created FLOAT NOT NULL, expires FLOAT, revoked FLOAT, models TEXT NOT NULL, balance BIGINT, held BIGINT NOT NULL,
    requests_per_minute INTEGER, tokens_per_minute INTEGER, concurrent INTEGER, context INTEGER, PRIMARY KEY (id),
    CONSTRAINT no_debt CHECK (balance IS NULL OR balance >= 0), CONSTRAINT no_negative_hold CHECK (held >= 0),
    UNIQUE (name), UNIQUE (hash));
CREATE TABLE credits (
    id {serial} NOT NULL, key_id VARCHAR(32) NOT NULL, amount BIGINT NOT NULL, note TEXT NOT NULL, at FLOAT NOT NULL,
    PRIMARY KEY (id), FOREIGN KEY(key_id) REFERENCES keys (id));
CREATE TABLE holds (
    request_id VARCHAR(64) NOT NULL, key_id VARCHAR(32) NOT NULL, amount BIGINT NOT NULL, owner VARCHAR(64) NOT NULL,
    at FLOAT NOT NULL, PRIMARY KEY (request_id), FOREIGN KEY(key_id) REFERENCES keys (id));
CREATE TABLE requests (
    request_id VARCHAR(64) NOT NULL, key_id VARCHAR(32) NOT NULL, model VARCHAR(200) NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    reasoning_tokens INTEGER NOT NULL, cost BIGINT NOT NULL, seed VARCHAR(24) NOT NULL,
    fingerprint VARCHAR(64) NOT NULL, finish_reason VARCHAR(32) NOT NULL,
    started FLOAT NOT NULL, ended FLOAT NOT NULL, PRIMARY KEY (request_id),
    FOREIGN KEY(key_id) REFERENCES keys (id));
CREATE INDEX requests_by_key ON requests (key_id, ended);
INSERT INTO migrations VALUES ('0001-first', 1790000000.5);
INSERT INTO keys VALUES
    ('key_00', 'ada', '{hash}', 'vk-abcdef…', 1790000000, NULL, NULL, '["m"]', 90, 40, 5, NULL, 2, 64);
INSERT INTO keys VALUES
    ('key_01', 'bob', 'ff', 'vk-ghijkl…', 1790000001, NULL, 1790000002, '[]', NULL, 0, NULL, NULL, NULL,
    NULL);
INSERT INTO credits (key_id, amount, note, at) VALUES ('key_00', 100, 'at creation', 1790000000);
INSERT INTO holds VALUES ('running', 'key_00', 40, '0123456789abcdef:77:1790000000.11', 1790000003);
INSERT INTO requests VALUES
    ('old', 'key_00', 'm', 3, 1, 4, 2, 10, '18446744073709551615', 'vb-0', 'stop', 1790000001, 1790000002);
"""
HASH = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of the secret `secret`


def made_by_the_first_release(url: str) -> str:
    """A database as the first release has left it, with a request that was running."""
    engine = create_engine(url)
    serial = "INTEGER" if engine.dialect.name == "sqlite" else "SERIAL"
    with engine.begin() as connection:
        for statement in FIRST.format(serial=serial, hash=HASH).split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    engine.dispose()
    return url


@pytest.fixture
def first(url: str) -> str:
    """Its URL."""
    return made_by_the_first_release(url)


def test_a_ledger_of_the_first_release(first: str) -> None:
    ledger = Ledger(first, Clock())
    ada, bob = ledger.all_keys()
    assert (ada.name, ada.balance, ada.held, ada.models) == ("ada", 90, 40, ("m",))
    assert ada.limits == Limits(5, None, 2, 64)
    assert bob.revoked == 1790000002
    assert not ada.admin
    assert not bob.admin, "who could only use the server before cannot manage it now"
    found = ledger.authenticate("secret")
    assert found is not None
    assert found.id == ada.id
    assert ledger.usage(by="day") == [
        {"key": "ada", "requests": 1, "prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": 4, "cost": 10,
         "day": "2026-09-21"},
    ]  # fmt: skip
    assert ledger.check() == []
    desk = Settler(ledger)
    for _ in range(8):
        desk.beat()
    assert ledger.key("ada").held == 0, "the server of the first release does not count, so it is gone"
    ledger.limit("ada", Limits(tokens_per_minute=2**40))
    desk.hold(ada.id, "new", 50)
    desk.settle(row(ada.id, "new", 20, finish_reason=",".join(["stop"] * 16), prompt_tokens=2**33))
    assert (ledger.key("ada").balance, ledger.aside(), ledger.check()) == (70, [], [])
    ledger.close()
    again = Ledger(first, Clock())
    assert [key.admin for key in again.all_keys()] == [False, False]
    assert again.create_key("root", admin=True).key.admin
    again.close()
    again = Ledger(first, Clock())  # nothing is applied twice
    names = [name for (name,) in query(again, "SELECT name FROM migrations ORDER BY name")]
    assert names == ["0001-first", "0002-widths", "0003-owners", "0004-receipts", "0005-admin"]
    again.close()


def test_the_tables_are_the_same_as_new_ones(first: str, tmp_path: Path) -> None:
    """Whether a ledger was made today or by the first release: the same columns, of kinds that take the same."""
    statement = (
        "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public'"
    )

    def columns(ledger: Ledger) -> set[tuple[object, ...]]:
        if ledger._database.kind == "postgresql":
            return set(query(ledger, statement))
        tables = [name for (name,) in query(ledger, "SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {(table, found[1]) for table in tables for found in query(ledger, f"PRAGMA table_info({table})")}

    old = Ledger(first, Clock())
    was = columns(old)
    if old._database.kind == "postgresql":
        with old._database.write() as connection:
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
        new = Ledger(first, Clock())
    else:
        new = Ledger(f"sqlite:///{tmp_path / 'new.db'}", Clock())
    assert columns(new) == was
    old.close()
    new.close()


def test_a_balance_that_had_become_a_float_is_a_number_again(file_url: str, file: Path) -> None:
    """Only SQLite lets a number become another kind of number."""
    first = made_by_the_first_release(file_url)
    connection = sqlite3.connect(file)
    connection.execute("UPDATE keys SET balance = 9223372036854775807 + 9223372036854775807, held = 0")
    connection.execute("DELETE FROM holds")
    connection.commit()
    connection.close()
    ledger = Ledger(first, Clock())
    assert ledger.key("ada").balance == 2**63 - 1
    ledger.hold("key_00", "r", 2**80)
    ledger.settle(row("key_00", "r", 1))
    assert ledger.key("ada").balance == 2**63 - 2
    ledger.close()


def test_two_servers_that_start_at_once(first: str) -> None:
    """Both migrate, one after the other."""
    faults: list[BaseException] = []

    def start() -> None:
        try:
            Ledger(first, Clock()).close()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []

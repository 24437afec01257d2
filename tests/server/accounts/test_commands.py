"""`verbatim keys` and `verbatim usage`, as a person and as a program use them."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from engine import ConfigError, Usage, VerbatimError
from server import cli
from server.accounts import commands
from server.ledger.records import Limits, Prices, Settled, UnknownKey, cost_of
from server.ledger.store import Ledger
from server.settings import read_settings


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*arguments: str) -> Any:
    return json.loads(said(*arguments, "--json"))


def test_a_key_is_shown_once(here: Path) -> None:
    output = said("keys", "create", "ada", "--balance", "100", "--requests-per-minute", "60")
    secret = next(line for line in output.splitlines() if line.startswith("vk-"))
    assert "next start" in output, "the first key shuts the door, from the next start on"
    for again in (said("keys", "list"), said("keys", "show", "ada"), json.dumps(told("keys", "list"))):
        assert secret not in again
        assert "ada" in again
    assert secret.encode() not in (here / "verbatim.db").read_bytes()
    assert "next start" not in said("keys", "create", "bob")
    made = told("keys", "create", "eve")
    ledger = Ledger(f"sqlite:///{here / 'verbatim.db'}", time.time)
    assert ledger.authenticate(secret) is not None
    assert ledger.authenticate(made["key"]) is not None
    ledger.close()


def test_an_admin_key_is_seen_as_one(here: Path) -> None:
    """Through its whole life: no later change of a key gives or takes its rights in passing."""
    assert told("keys", "create", "root", "--admin")["admin"] is True
    assert told("keys", "create", "ada")["admin"] is False
    for name in ("root", "ada"):
        told("keys", "limit", name, "--concurrent", "3")
        told("keys", "credit", name, "5")
    assert {key["name"]: key["admin"] for key in told("keys", "list")} == {"root": True, "ada": False}
    rows = {line.split()[0]: line for line in said("keys", "list").splitlines() if "vk-" in line}
    assert " admin " in rows["root"]
    assert " admin " not in rows["ada"]
    assert told("keys", "revoke", "root")["admin"] is True


def test_a_key_through_its_life(here: Path) -> None:
    key = told("keys", "create", "ada", "--expires", "30d", "-m", "demo", "-m", "other", "--concurrent", "2")
    assert (key["models"], key["concurrent"], key["balance"]) == (["demo", "other"], 2, None)
    assert 29 * 86400 < key["expires"] - time.time() <= 30 * 86400
    assert told("keys", "credit", "ada", "500", "--note", "a start")["balance"] == 500
    assert told("keys", "credit", "ada", "-200")["balance"] == 300
    with pytest.raises(Exception, match="300 to take away"):
        said("keys", "credit", "ada", "-301")
    limited = told("keys", "limit", "ada", "--tokens-per-minute", "1000", "--context", "64")
    assert (limited["concurrent"], limited["tokens_per_minute"], limited["context"]) == (2, 1000, 64)
    limited = told("keys", "limit", "ada", "--concurrent", "0", "-m", "*")
    assert (limited["concurrent"], limited["tokens_per_minute"], limited["models"]) == (None, 1000, [])
    assert told("keys", "revoke", "ada")["state"] == "revoked"
    assert [key["name"] for key in told("keys", "list")] == ["ada"]


def test_what_was_used(here: Path) -> None:
    said("keys", "create", "ada", "--balance", "1000")
    said("keys", "create", "=cmd()", "--balance", "1000")
    ledger = Ledger(f"sqlite:///{here / 'verbatim.db'}", time.time)
    used = Usage(5, 7, cached_tokens=2)
    for number, name in enumerate(("ada", "ada", "=cmd()")):
        key, day = ledger.key(name).id, 1_793_491_200.0 + number * 86400  # 2026-11-01
        ledger.hold(key, f"r{number}", 100)
        cost = cost_of(used, Prices())
        ledger.settle(Settled(f"r{number}", key, "demo", 5, 2, 7, 0, cost, 1, "vb-0", "stop", day, day))
    ledger.close()
    assert [(row["key"], row["requests"], row["cost"]) for row in told("usage")] == [("=cmd()", 1, 12), ("ada", 2, 24)]
    assert [row["day"] for row in told("usage", "--by", "day", "--key", "ada")] == ["2026-11-01", "2026-11-02"]
    assert [row["requests"] for row in told("usage", "--since", "2026-11-02", "--key", "ada")] == [1]
    assert "2026-11-02" in said("usage", "--by", "day")
    rows = list(csv.DictReader(io.StringIO(said("usage", "--csv", "--by", "model"))))
    assert [(row["key"], row["cost"]) for row in rows] == [("'=cmd()", "12"), ("ada", "24")]
    assert {row["model"] for row in rows} == {"demo"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("keys", "list"), "no keys yet"),
        (("usage",), "no keys yet"),
        (("keys", "create", "a\nb"), "printable"),
        (("keys", "create", ""), "printable"),
        (("keys", "create", "a", "--expires", "soon"), "2026-12-31"),
        (("usage", "--by", "hour"), "day or model"),
    ],
)
def test_mistakes_are_told_and_change_nothing(here: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        said(*arguments)
    assert not (here / "verbatim.db").exists()


def test_a_name_that_is_not_there_or_taken(here: Path) -> None:
    said("keys", "create", "ada")
    for arguments in (
        ("show", "bob"),
        ("revoke", "bob"),
        ("credit", "bob", "1"),
        ("limit", "bob", "--context", "1"),
    ):
        with pytest.raises(UnknownKey, match="bob"):
            said("keys", *arguments)
    with pytest.raises(Exception, match="already"):
        said("keys", "create", "ada")


def test_the_ledger_of_a_configuration(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "my.yaml").write_text("models: [{id: a, path: w}]\nserver: {ledger: accounts.db}\n")
    said("keys", "create", "ada", "--config", "sub/my.yaml")
    assert (here / "sub" / "accounts.db").exists()
    assert told("keys", "show", "ada", "--config", "sub/my.yaml")["name"] == "ada"


def test_limits_of_a_new_key_are_those_that_were_given(here: Path) -> None:
    said("keys", "create", "ada", "--requests-per-minute", "3")
    ledger = Ledger(f"sqlite:///{here / 'verbatim.db'}", time.time)
    assert ledger.key("ada").limits == Limits(requests_per_minute=3)
    ledger.close()


LARGEST = 2**53 - 1


@pytest.mark.parametrize("number", [LARGEST + 1, 2**63, 2**64, 10**40, -(10**40)])
@pytest.mark.parametrize(
    "command",
    [
        ("create", "bob", "--balance"), ("create", "bob", "--requests-per-minute"),
        ("create", "bob", "--tokens-per-minute"), ("create", "bob", "--concurrent"), ("create", "bob", "--context"),
        ("limit", "ada", "--requests-per-minute"), ("limit", "ada", "--tokens-per-minute"),
        ("limit", "ada", "--concurrent"), ("limit", "ada", "--context"), ("credit", "ada"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_beyond_what_a_ledger_holds(here: Path, command: tuple[str, ...], number: int) -> None:
    """One line that names the value and the limit, and nothing is changed."""
    before = told("keys", "create", "ada", "--balance", "5")
    arguments = ["keys", *command, str(number)]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert str(number) in result.output
    assert str(LARGEST) in result.output
    assert told("keys", "list") == [{name: value for name, value in before.items() if name != "key"}]


def test_every_number_of_the_keys_has_a_limit() -> None:
    """Also those of options that are still to come."""
    numbers = 0
    for command in commands.keys.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            kind, *more = get_args(hint) or (hint,)
            if int in (kind, *get_args(kind)) or float in (kind, *get_args(kind)):
                numbers += 1
                assert [one.callback for one in more] in ([commands._natural], [commands._amount]), (
                    command.callback,
                    name,
                )
    assert numbers == 10


def test_a_balance_has_a_limit_too(here: Path) -> None:
    said("keys", "create", "ada", "--balance", str(LARGEST))
    with pytest.raises(VerbatimError, match=f"at most {LARGEST}; ada has {LARGEST}, and 1 is more"):
        said("keys", "credit", "ada", "1")
    assert told("keys", "credit", "ada", "-1")["balance"] == LARGEST - 1
    assert told("keys", "credit", "ada", "1")["balance"] == LARGEST


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("keys", "create", "bob", "--expires", "9999-12-31"), "2026-12-31"),
        (("keys", "create", "bob", "--expires", "100000w"), "2026-12-31"),
        (("keys", "create", "bob\ud800"), "printable"),
        (("keys", "create", "bob", "-m", "m\ud800"), "printable"),
        (("keys", "credit", "ada", "1", "--note", "\udcff"), "printable"),
        (("keys", "credit", "ada", "1", "--note", "x" * 1001), "at most 1000"),
        (("keys", "revoke", "\udcff"), "no key"),
        (("keys", "show", "x" * 10**6), "no key"),
        (("usage", "--key", "\udcff"), "no key"),
        (("usage", "--since", "1e999"), "since must be"),
        (("usage", "--since", "9" * 5000), "since must be"),
    ],
)
def test_texts_that_no_ledger_holds(here: Path, arguments: tuple[str, ...], message: str) -> None:
    said("keys", "create", "ada")
    with pytest.raises(VerbatimError, match=message):
        said(*arguments)
    assert [key["name"] for key in told("keys", "list")] == ["ada"]


def test_a_word_that_is_one_key_s_id_and_another_s_name(here: Path) -> None:
    """Neither is guessed: the wrong one might be revoked. No such name can be given any more; older ledgers have it."""
    ada = told("keys", "create", "ada")
    with pytest.raises(VerbatimError, match="with this id"):
        said("keys", "create", ada["id"])
    bob = told("keys", "create", "bob")
    with sqlite3.connect(here / "verbatim.db") as connection:
        connection.execute("UPDATE keys SET name = ? WHERE name = 'bob'", (ada["id"],))
    for arguments in (("revoke", ada["id"]), ("credit", ada["id"], "1"), ("show", ada["id"]), ("limit", ada["id"])):
        with pytest.raises(VerbatimError, match="'ada'") as refused:
            said("keys", *arguments)
        assert bob["id"] in refused.value.message
    assert told("keys", "revoke", bob["id"])["name"] == ada["id"]
    assert told("keys", "show", "ada")["state"] == "good"
    ledger = Ledger(f"sqlite:///{here / 'verbatim.db'}", time.time)
    assert ledger.usage(key_id=ada["id"]) == [], "the server asks by the id alone"
    ledger.close()


def test_what_was_set_aside_is_said_until_somebody_has_seen_it(here: Path) -> None:
    said("keys", "create", "ada", "--balance", "100")
    assert "adds up" in said("keys", "check")
    ledger = Ledger(f"sqlite:///{here / 'verbatim.db'}", time.time)
    ledger.hold(ledger.key("ada").id, "r", 10)
    row = Settled("r", ledger.key("ada").id, "demo", 2**70, 2, 7, 0, 9, 1, "vb-0", "stop", 1.0, 2.0)
    ledger.set_aside(row, "too large")
    ledger.close()
    for arguments, code in ((("check",), 1), (("check", "--seen"), 1), (("check",), 0)):
        result = CliRunner().invoke(cli.app, ["keys", *arguments], catch_exceptions=False)
        assert (result.exit_code, str(2**70) in result.output) == (code, bool(code))
    assert told("keys", "show", "ada")["balance"] == 91


def test_a_price_has_a_limit() -> None:
    with pytest.raises(ConfigError, match="1000000000"):
        read_settings({"server": {"prices": {"m": {"prompt": 10**9 + 1}}}}, "models.yaml")

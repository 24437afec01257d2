"""`verbatim keys` and `verbatim usage`, as a person and as a program use them."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine import ConfigError, Usage
from server import cli
from server.ledger import Ledger, Limits, Prices, Settled, UnknownKey, cost_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


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
    (here / "sub" / "my.yaml").write_text("models: [{id: a, path: w}]\nserver: {ledger: books.db}\n")
    said("keys", "create", "ada", "--config", "sub/my.yaml")
    assert (here / "sub" / "books.db").exists()
    assert told("keys", "show", "ada", "--config", "sub/my.yaml")["name"] == "ada"


def test_limits_of_a_new_key_are_those_that_were_given(here: Path) -> None:
    said("keys", "create", "ada", "--requests-per-minute", "3")
    ledger = Ledger(f"sqlite:///{here / 'verbatim.db'}", time.time)
    assert ledger.key("ada").limits == Limits(requests_per_minute=3)
    ledger.close()

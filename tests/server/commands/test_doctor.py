"""`verbatim doctor`: each thing that is wrong is named with its cure, and the exit code says so."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine import LoadError
from server import cli
from server.commands.doctor import machine
from server.commands.doctor.setup import look_at_setup


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(config: str = "", file: Path | None = None) -> dict[str, Any]:
    if config:
        Path("models.yaml").write_text(config)
    return {one.name: one for one in look_at_setup(file)}


_DEMO = "models:\n  - {id: a, builtin: demo}\n"


@pytest.mark.parametrize(
    ("config", "name", "state", "words"),
    [
        ("models: []\n", "configuration", "fault", "at least one entry"),
        ("models:\n  - {id: a, path: gone}\n", "model a", "fault", "no such folder"),
        (_DEMO + "server: {host: 0.0.0.0, port: 0}\n", "access", "fault", "keys create"),
        (_DEMO + "server: {host: 0.0.0.0, port: 0, allow_anonymous: true}\n", "access", "warn", "anybody"),
        (_DEMO + "server: {host: host.invalid}\n", "port", "warn", "host.invalid"),
        (_DEMO + "server: {receipts: {keep: r, sign: gone.pem}}\n", "receipts' key", "fault", "gone.pem is missing"),
        (_DEMO, "configuration", "ok", "models.yaml"),
        (_DEMO, "model a", "ok", "built in"),
        (_DEMO, "ledger", "ok", "no keys"),
    ],
)
def test_what_is_found(here: Path, config: str, name: str, state: str, words: str) -> None:
    one = found(config)[name]
    assert (one.state, bool(one.cure)) == (state, state != "ok")
    assert words in f"{one.detail} {one.cure}"


def test_a_port_that_is_taken(here: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one = found(f"{_DEMO}server: {{port: {port}}}\n")["port"]
    assert one.state == "warn"
    assert str(port) in one.detail


def test_a_damaged_ledger_is_a_fault_that_names_its_file(here: Path) -> None:
    (here / "verbatim.db").write_bytes(b"no database at all" * 100)
    one = found(_DEMO)["ledger"]
    assert one.state == "fault"
    assert str(here / "verbatim.db") in one.detail
    (here / "verbatim.db").unlink()
    sqlite3.connect(here / "verbatim.db").close()
    assert found()["ledger"].state == "ok"


def test_a_key_that_others_can_read(here: Path) -> None:
    (here / "key.pem").write_text("secret")
    (here / "key.pem").chmod(0o644)
    one = found(f"{_DEMO}server: {{receipts: {{sign: key.pem}}}}\n")["receipts' key"]
    assert (one.state, one.cure) == ("warn", "chmod 600 key.pem")


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(say: Any) -> str:
        raise LoadError("no C compiler was found.")

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "cpu_kernels", none)
    monkeypatch.setattr(machine, "_gpu", lambda say: machine.ok("gpu", "none"))
    states = {one.name: one for one in machine.look_at_machine(lambda text: None)}
    assert states["compiler"].state == states["kernels"].state == "warn"
    assert "install gcc or clang" in states["compiler"].cure
    assert all(one.cure for one in states.values() if one.state != "ok")


@pytest.mark.parametrize("broken", [False, True])
def test_the_exit_code_and_json(here: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    monkeypatch.setattr(machine, "cpu_kernels", lambda say: "AVX2")
    monkeypatch.setattr(machine, "_gpu", lambda say: machine.ok("gpu", "none"))
    (here / "models.yaml").write_text("models:\n  - {id: a, path: gone}\n" if broken else _DEMO)
    result = CliRunner().invoke(cli.application("doctor"), ["doctor", "--json"])
    document = json.loads(result.stdout)
    assert (result.exit_code, document["well"]) == (int(broken), not broken)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.application("doctor"), ["doctor"])
    assert ("→ mend its path" in result.stdout) == broken

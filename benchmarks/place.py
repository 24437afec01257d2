"""A server with keys in a folder of its own, on the noise checkpoint, and its ledger: where the soaks run."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.common import ROOT, child_environment
from engine import ensure_noise_checkpoint
from server.ledger.store import Ledger

CREDIT = 10**9
KEYS = 4
_READY_SECONDS = 120.0
HELLO = [{"role": "user", "content": "Hello there."}]


class Wrong(Exception):
    """Something does not add up."""


@dataclass(slots=True)
class Place:
    """A folder with a models.yaml and keys."""

    folder: Path
    keys: list[str] = field(default_factory=list)

    @property
    def database(self) -> Path:
        return self.folder / "verbatim.db"

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        ledger = Ledger(f"sqlite:///{self.database}", time.time)
        try:
            yield ledger
        finally:
            ledger.close()

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
        """A server that is ready, and its address."""
        log = self.folder / "log"
        with log.open("ab") as output:
            begin = log.stat().st_size
            process = subprocess.Popen(
                [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", "0"],
                cwd=self.folder,
                env=child_environment(PYTHONPATH=str(ROOT)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            try:
                yield process, _ready(process, log, begin)
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)


@contextlib.contextmanager
def place(model: Path | None = None, **server: Any) -> Iterator[Place]:
    """A fresh one, with keys that have credit. `model`: a checkpoint's folder in place of the noise checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Place(Path(scratch))
        entry = {
            "id": "tiny",
            "path": str(model or ensure_noise_checkpoint()),
            "context_length": 512,
            "max_queue": 300,
            "threads": 1,
        }
        (made.folder / "models.yaml").write_text(json.dumps({"models": [entry], "server": server}))
        with made.ledger() as ledger:
            made.keys = [ledger.create_key(f"k{i}", balance=CREDIT).secret for i in range(KEYS)]
        yield made


def _ready(process: subprocess.Popen[bytes], log: Path, begin: int) -> str:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        said = log.read_bytes()[begin:].decode()
        if "http://127.0.0.1:" in said:
            url = "http://127.0.0.1:" + said.split("http://127.0.0.1:")[1].split()[0]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready", timeout=2).status_code == 200:
                    return url
        time.sleep(0.05)
    raise Wrong(f"the server did not start: {log.read_text()[-2000:]}")


def check_ledger(found: Place) -> dict[str, int]:
    """Every balance is its credits minus its settled rows, and nothing is held. Costs by request."""
    with found.ledger() as ledger:
        problems = ledger.check()
        problems += [f"{key.name} still holds {key.held}" for key in ledger.all_keys() if key.held]
        spent = sum(CREDIT - (key.balance or 0) for key in ledger.all_keys())
    with contextlib.closing(sqlite3.connect(found.database)) as database:
        rows = dict(database.execute("SELECT request_id, cost FROM requests").fetchall())
    if spent != sum(rows.values()):
        problems.append(f"{spent} were spent, and the rows say {sum(rows.values())}")
    if problems:
        raise Wrong("; ".join(problems))
    return rows


def settled_ledger(found: Place) -> dict[str, int]:
    """The ledger, once all that ran is settled."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return check_ledger(found)
        except Wrong:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its children."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))

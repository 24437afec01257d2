"""Receipts as a user has them: a server process, what it keeps on disk and in a ledger, and the commands beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from ledger_for_tests import POSTGRES, WITH_POSTGRES, empty_postgres
from live_server import start

pytestmark = pytest.mark.slow


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from server.cli import main; main()", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def configure(folder: Path, checkpoint: Path, receipts: str, **server: Any) -> None:
    settings = "".join(f"  {name}: {value}\n" for name, value in {**server, "receipts": receipts}.items())
    (folder / "models.yaml").write_text(
        f"models:\n  - {{id: tiny, path: {checkpoint}, context_length: 128, cache_size: 8MiB, threads: 1}}\n"
        f"server:\n{settings}"
    )


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, "seed": 1, "receipt": True, **fields}


def test_a_folder_and_a_signature(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Make a key, serve, ask, stop: the reply that was saved is checked without the server, and found in the folder."""
    made = command(tmp_path, "receipts", "keygen", "key.pem")
    assert made.returncode == 0, made.stderr
    assert command(tmp_path, "receipts", "keygen", "key.pem").returncode == 1
    configure(tmp_path, tiny("qwen3"), "{keep: kept, sign: key.pem, days: 9}")
    with start([], tmp_path) as server:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body(), timeout=60)
        assert reply.status_code == 200, reply.text
        (tmp_path / "reply.json").write_bytes(reply.content)
        id = reply.json()["id"]
        found = httpx.get(f"{server.url}/v1/receipts/{id}").json()
        assert found == reply.json()["receipt"]
        public = httpx.get(f"{server.url}/v1/receipts/key").json()["public_key"]
        assert public == (tmp_path / "key.pem.pub").read_text()
        remote = command(tmp_path, "verify", "reply.json", "--url", server.url, "--key", "key.pem.pub", "--json")
        assert json.loads(remote.stdout)["verdict"] == "identical", remote.stderr
        assert remote.returncode == 0
    assert (tmp_path / f"kept/anonymous/{id}.json").exists()
    alone = command(tmp_path, "verify", f"kept/anonymous/{id}.json", "--key", "key.pem.pub", "--json")
    assert json.loads(alone.stdout)["verdict"] == "identical", alone.stderr
    listed = command(tmp_path, "receipts", "list", "--json")
    assert json.loads(listed.stdout) == {
        "id": id,
        "key": "anonymous",
        "created": reply.json()["created"],
        "model": json.loads(command(tmp_path, "receipts", "show", id).stdout)["model"]["name"],
    }
    assert json.loads(command(tmp_path, "receipts", "show", id, "--as-kept").stdout) == found
    unknown = command(tmp_path, "receipts", "show", "chatcmpl-0")
    assert (unknown.returncode, unknown.stdout) == (1, "")


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgres", marks=WITH_POSTGRES)])
def test_a_ledger_with_keys(tiny: Callable[[str], Path], tmp_path: Path, database: str) -> None:
    url = empty_postgres() if database == "postgres" else "keys.db"
    assert (url == POSTGRES) == (database == "postgres")
    configure(tmp_path, tiny("qwen3"), "{keep: ledger, always: true}", ledger=url)
    secrets = []
    for name in ("ann", "bob"):
        made = command(tmp_path, "keys", "create", name, "--json")
        assert made.returncode == 0, made.stderr
        secrets.append(json.loads(made.stdout)["key"])
    ann, bob = ({"authorization": f"Bearer {secret}"} for secret in secrets)
    with start([], tmp_path) as server:
        address = f"{server.url}/v1"
        reply = httpx.post(f"{address}/chat/completions", json=body(receipt=False), headers=ann, timeout=60)
        assert reply.status_code == 200, reply.text
        id = reply.json()["id"]
        receipt = httpx.get(f"{address}/receipts/{id}", headers=ann)
        assert receipt.status_code == 200
        assert httpx.get(f"{address}/receipts/{id}", headers=bob).status_code == 404
        assert httpx.get(f"{address}/receipts/{id}").status_code == 401
        assert [one["id"] for one in httpx.get(f"{address}/receipts", headers=ann).json()["data"]] == [id]
        assert httpx.get(f"{address}/receipts", headers=bob).json()["data"] == []
        report = httpx.post(f"{address}/receipts/verify", json=receipt.json(), headers=bob, timeout=60).json()
        assert report["verdict"] == "identical", report
    listed = command(tmp_path, "receipts", "list", "--json")
    assert json.loads(listed.stdout)["id"] == id, listed.stderr


def test_settings_that_contradict_each_other_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for receipts, sentence in (
        ("{always: true}", "always needs keep"),
        ("{days: 3}", "days needs keep"),
        ("{sign: missing.pem}", "missing.pem"),
        ("{keep: models.yaml}", "receipts cannot be kept"),
    ):
        configure(tmp_path, tiny("qwen3"), receipts)
        done = command(tmp_path, "serve", "--port", "0")
        assert done.returncode == 1
        assert sentence in done.stderr, done.stderr
        assert "Traceback" not in done.stderr

"""Crashes, full disks, damaged databases, stuck clients: real processes, real files. The ledger adds up after each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import Server, start
from openai import OpenAI

from server.ledger.store import Ledger

pytestmark = pytest.mark.slow
HELLO: Any = [{"role": "user", "content": "Hello there."}]
ROUNDS = 2
"""Of killing; `benchmarks/soak.py --rounds 20` does more."""
PATIENCE = 60.0
"""Seconds within which a busy machine answers the first requests, too."""


def write(folder: Path, weights: Path, model: dict[str, Any] | None = None, **server: Any) -> Path:
    """A models.yaml over a tiny model, with short patience."""
    settings = {"shutdown_seconds": 1, "send_seconds": 2, "body_seconds": 2, **server}
    entry = {
        "id": "tiny", "path": str(weights), "context_length": 512, "cache_size": "16MiB", "max_sequences": 4,
        "max_queue": 100, "threads": 1, **(model or {}),
    }  # fmt: skip
    (folder / "models.yaml").write_text(json.dumps({"models": [entry], "server": settings}))
    return folder


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    """A place to serve from."""
    return write(tmp_path, tiny("qwen3"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[tuple[Server, Path]]:
    """One server with keys for all tests that leave it as it was, and its folder."""
    folder = write(tmp_path_factory.mktemp("served"), tiny("qwen3"), access_log=True, log_format="json")
    new_key(folder, "first")
    with start([], folder) as server:
        yield server, folder


def verbatim(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from server.cli import main; main()", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def new_key(folder: Path, name: str, *options: str) -> str:
    made = verbatim(folder, "keys", "create", name, "--json", *options)
    assert made.returncode == 0, made.stderr
    return str(json.loads(made.stdout)["key"])


def client(server: Server, key: str, retries: int = 0) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=retries, timeout=120)


def ask(server: Server, key: str, retries: int = 0, **fields: Any) -> Any:
    given = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "seed": 1, **fields}
    with client(server, key, retries) as asking:
        return asking.chat.completions.create(**given)


@contextlib.contextmanager
def opened_ledger(folder: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{folder / 'verbatim.db'}", time.time)
    try:
        yield ledger
    finally:
        ledger.close()


def test_killed_in_the_middle_of_many_requests(folder: Path) -> None:
    """No hold is left, nothing is charged twice, and a balance is its credits minus its settled rows."""
    keys = [new_key(folder, f"k{i}", "--balance", "1000000") for i in range(4)]
    answered: dict[str, int] = {}
    for _ in range(ROUNDS):
        with start([], folder) as server, ThreadPoolExecutor(64) as pool:
            stop = threading.Event()

            def work(number: int, server: Server = server, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    with contextlib.suppress(openai.OpenAIError):
                        reply = ask_raw(server, keys[number % 4])
                        answered[reply["id"]] = reply["usage"]["total_tokens"]

            before = len(answered)
            running = [pool.submit(work, number) for number in range(64)]
            deadline = time.monotonic() + PATIENCE
            while len(answered) < before + 64 and time.monotonic() < deadline:
                time.sleep(0.02)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(60)
            stop.set()
            for one in running:
                one.result()
    assert answered
    with start([], folder) as server:
        with opened_ledger(folder) as ledger:
            assert ledger.check() == []
            assert [key.held for key in ledger.all_keys()] == [0] * 4
        used = {key: httpx.get(f"{server.url}/v1/usage", headers=bearer(key)).json() for key in keys}
    database = sqlite3.connect(folder / "verbatim.db")
    rows = dict(database.execute("SELECT request_id, cost FROM requests").fetchall())
    missing = {name: tokens for name, tokens in answered.items() if rows.get(name) != tokens}
    assert not missing, "an answer that has arrived was settled before"
    assert sum(1_000_000 - one["balance"] for one in used.values()) == sum(rows.values())


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask_raw(server: Server, key: str, **fields: Any) -> dict[str, Any]:
    """Like `ask`, but whatever breaks is an error of the client library."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "ignore_eos": True, **fields}
    try:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=bearer(key), timeout=120)
    except httpx.HTTPError as error:
        raise openai.OpenAIError(str(error)) from None
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_statuses_as_the_client_library_sees_them(served: tuple[Server, Path]) -> None:
    server, folder = served
    key = new_key(folder, "ada", "--requests-per-minute", "2")
    poor = new_key(folder, "bob", "--balance", "10")
    with pytest.raises(openai.AuthenticationError, match="not known"):
        ask(server, "vk-nobody")
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server, poor)
    assert caught.value.status_code == 402
    assert ask(server, key).usage.completion_tokens > 0
    ask(server, key)
    with pytest.raises(openai.RateLimitError) as limited:
        ask(server, key)
    assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
    # With retries, what cannot be helped is not tried again: one request for a 401, and one for a 402.
    for nobody in ("vk-nobody", poor):
        sent: list[httpx.Request] = []
        with httpx.Client(event_hooks={"request": [sent.append]}, timeout=120) as counted:
            patient = client(server, nobody, retries=3).with_options(http_client=counted)
            with pytest.raises(openai.APIStatusError):
                patient.chat.completions.create(model="tiny", messages=HELLO, max_tokens=400)
        assert len(sent) == 1
    assert verbatim(folder, "keys", "revoke", "ada").returncode == 0
    with pytest.raises(openai.AuthenticationError):
        ask(server, key)


def test_a_busy_key_is_served_when_it_is_tried_again(served: tuple[Server, Path]) -> None:
    server, folder = served
    key = new_key(folder, "fay", "--concurrent", "1")
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, server, key, retries=20, max_tokens=450, extra_body={"ignore_eos": True})
        refused = None
        while refused is None and not long.done():
            try:
                ask(server, key, max_tokens=1)
            except openai.RateLimitError as error:
                refused = error
        assert refused is not None, "the long one was never in the way"
        assert refused.response.headers["retry-after"] == "1"
        assert ask(server, key, retries=20, max_tokens=1).choices
        long.result()


def test_a_full_queue_and_its_retry(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    folder = write(tmp_path, tiny("qwen3"), {"max_sequences": 1, "max_queue": 0}, retry_after_seconds=1)
    with start([], folder) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, server, "none", retries=20, max_tokens=450, extra_body={"ignore_eos": True})
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
        full = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
        while full.status_code != 503:
            assert not long.done(), "the queue never was full"
            full = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
        assert (full.json()["error"]["code"], full.headers["retry-after"]) == ("queue_full", "1")
        assert ask(server, "none", retries=20, max_tokens=1).choices
        long.result()


def test_no_server_for_everybody_by_accident(folder: Path) -> None:
    for host in ("0.0.0.0", "::"):
        refused = verbatim(folder, "serve", "--host", host, "--port", "0")
        assert refused.returncode == 1
        assert "verbatim keys create" in refused.stderr
        assert "--allow-anonymous" in refused.stderr


@pytest.mark.parametrize("damage", ["garbage", "newer", "folder"])
def test_a_damaged_ledger_is_a_refusal_to_start(folder: Path, damage: str) -> None:
    file = folder / "verbatim.db"
    new_key(folder, "ada")
    if damage == "garbage":
        file.write_bytes(b"this is no database" * 1000)
    elif damage == "newer":
        database = sqlite3.connect(file)
        database.execute("INSERT INTO migrations VALUES ('9999-later', 0)")
        database.commit()
    else:
        file.unlink()
        for other in folder.glob("verbatim.db-*"):
            other.unlink()
        file.mkdir()
    refused = verbatim(folder, "serve", "--port", "0")
    assert refused.returncode == 1
    assert "ledger" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_locked_ledger_serves_nobody_until_it_is_free(served: tuple[Server, Path]) -> None:
    server, folder = served
    key = new_key(folder, "carl", "--balance", "1000")
    other = sqlite3.connect(folder / "verbatim.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "tiny", "messages": HELLO, "max_tokens": 2},
        headers=bearer(key),
        timeout=120,
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_fault")
    assert str(folder) not in answer.text
    other.execute("ROLLBACK")
    assert ask(server, key, max_tokens=2).usage.completion_tokens <= 2
    with opened_ledger(folder) as ledger:
        assert ledger.check() == []


def test_a_client_that_stops_reading_or_never_sends(served: tuple[Server, Path]) -> None:
    server, folder = served
    key = new_key(folder, "dora", "--balance", "1000000")
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 450, "ignore_eos": True, "stream": True,
                       "logprobs": True, "top_logprobs": 20}).encode()  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    readers = []
    for _ in range(3):
        reader = socket.create_connection(("127.0.0.1", server.port))
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        readers.append(reader)
    slow = socket.create_connection(("127.0.0.1", server.port))
    slow.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
    silent, half = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(2))
    half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
    slow.settimeout(60)
    assert b" 408 " in slow.recv(4096)
    deadline = time.monotonic() + 120
    while True:
        with opened_ledger(folder) as ledger:
            if not ledger.key("dora").held and ledger.usage(key="dora"):
                break
        assert time.monotonic() < deadline, "a reader that reads nothing still holds its place"
        time.sleep(0.2)
    assert ask(server, key, max_tokens=2).choices
    for one in (silent, half):
        one.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(10) == b"", "a head that does not come is not waited for"
    for one in (*readers, slow, silent, half):
        one.close()


def test_an_orderly_stop_ends_streams_with_an_error_event_and_settles(folder: Path) -> None:
    key = new_key(folder, "ada", "--balance", "1000000")
    with start([], folder) as server:
        events: list[str] = []
        with httpx.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json={"model": "tiny", "messages": HELLO, "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 16},
            headers=bearer(key),
            timeout=120,
        ) as stream:
            assert stream.status_code == 200
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    events.append(line)
                if len(events) == 20:
                    server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        last = json.loads(events[-1].removeprefix("data: ")) if events[-1] != "data: [DONE]" else None
    assert last is not None, "480 tokens of 16 choices in a second is too fast for this test"
    assert last["error"]["code"] == "engine_dead"
    assert "shutting down" in last["error"]["message"]
    with opened_ledger(folder) as ledger:
        assert ledger.check() == []
        [row] = ledger.usage()
        assert row["completion_tokens"] >= 16
        assert ledger.key("ada").held == 0


def test_the_access_log_is_json_and_says_nothing_of_the_text(served: tuple[Server, Path]) -> None:
    server, folder = served
    key = new_key(folder, "eve, née x")
    hostile = {"x-request-id": "a b\tc", **bearer(key)}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "SECRET"}], "max_tokens": 1}
    httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=hostile, timeout=120)
    httpx.get(f"{server.url}/%0a{{%22level%22:1}}")
    deadline = time.monotonic() + 60
    while r"{\"level\":1}" not in (said := server.log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    [mine] = [line for line in lines if line.get("key") == "eve, née x"]
    assert (mine["status"], mine["model"], mine["path"]) == (200, "tiny", "/v1/chat/completions")
    assert mine["request_id"].startswith("req-")
    assert lines[-1]["path"] == '/\n{"level":1}'
    assert lines[-1]["status"] == 401
    assert "SECRET" not in said
    assert key not in said


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_server_leaves_no_core_dump(served: tuple[Server, Path]) -> None:
    process = Path("/proc") / str(served[0].process.pid)
    assert re.search(r"Max core file size +0 ", (process / "limits").read_text())
    assert int((process / "coredump_filter").read_text(), 16) == 0

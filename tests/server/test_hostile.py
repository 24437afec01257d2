"""Every attack of benchmarks/attacks.py on a real server, beside four honest clients and one that asks for its health.

`benchmarks/soak.py hostile` does the same and measures; here it is only asked whether anybody else could tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Server, start

from benchmarks.attacks import ATTACKS, PAGES, REBINDING, Attack, Target, answer_of, get, post, request
from server.ledger.store import Ledger

pytestmark = pytest.mark.slow
CREDIT = 10**9
HONEST = 4
BODY = {
    "model": "tiny", "messages": [{"role": "user", "content": "Hello there."}], "max_tokens": 20, "ignore_eos": True,
    "logprobs": True,
}  # fmt: skip


@dataclass
class Honest:
    """What clients met that only wanted an answer."""

    complaints: list[str] = field(default_factory=list)
    answers: int = 0
    healthy: int = 0
    _replies: dict[int, str] = field(default_factory=dict)

    def ask(self, client: httpx.Client, headers: dict[str, str], seed: int) -> None:
        """One request; its reply has to be the one that the same seed had before."""
        answer = client.post("/v1/chat/completions", json={**BODY, "seed": seed}, headers=headers)
        if answer.status_code != 200:
            self.complaints.append(f"{answer.status_code}: {answer.text[:200]}")
            return
        self.answers += 1
        text = json.dumps(answer.json()["choices"])
        if self._replies.setdefault(seed, text) != text:
            self.complaints.append(f"seed {seed} had another reply")

    def ask_health(self, client: httpx.Client) -> None:
        if client.get("/health/live").status_code != 200:
            self.complaints.append("/health/live failed")
        self.healthy += 1


@dataclass
class Place:
    server: Server
    folder: Path
    keys: list[str]
    honest: Honest

    @property
    def target(self) -> Target:
        return Target(self.server.port, self.keys[-1])


def write(folder: Path, weights: Path, **server: Any) -> None:
    entry = {
        "id": "tiny", "path": str(weights), "context_length": 512, "cache_size": "16MiB", "max_sequences": 8,
        "threads": 1,
    }  # fmt: skip
    settings = {"shutdown_seconds": 1, "send_seconds": 5, "body_seconds": 5, **server}
    (folder / "models.yaml").write_text(json.dumps({"models": [entry], "server": settings}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[Place]:
    """A server with keys, and honest clients that never stop asking."""
    folder = tmp_path_factory.mktemp("hostile")
    write(folder, tiny("qwen3"))
    ledger = Ledger(f"sqlite:///{folder / 'verbatim.db'}", time.time)
    keys = [ledger.create_key(f"k{i}", balance=CREDIT).secret for i in range(HONEST + 1)]
    ledger.close()
    over = threading.Event()
    with start([], folder) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        honest = Honest()

        def go_on(number: int) -> None:
            while not over.is_set():
                honest.ask(client, {"authorization": f"Bearer {keys[number]}"}, number)

        def watch() -> None:
            while not over.is_set():
                honest.ask_health(client)
                time.sleep(0.02)

        threads = [threading.Thread(target=go_on, args=(number,)) for number in range(HONEST)]
        threads.append(threading.Thread(target=watch))
        for thread in threads:
            thread.start()
        try:
            yield Place(server, folder, keys, honest)
        finally:
            over.set()
            for thread in threads:
                thread.join(60)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_nobody_else_can_tell(place: Place, attack: Attack) -> None:
    """The attack has its answer, and meanwhile honest clients have theirs."""
    answers, healthy, log = place.honest.answers, place.honest.healthy, len(place.server.log.read_text())
    got = attack.send(place.target)
    assert place.server.process.poll() is None, place.server.log.read_text()[log:]
    assert set(got) <= attack.right, place.server.log.read_text()[log:]
    deadline = time.monotonic() + 60
    while place.honest.answers < answers + 2 or place.honest.healthy < healthy + 2:
        assert time.monotonic() < deadline, "nobody is answered any more"
        time.sleep(0.01)
    assert not place.honest.complaints
    assert "Traceback" not in place.server.log.read_text()[log:]


def test_afterwards_the_books_add_up(place: Place) -> None:
    """Charged is what is written down, and the attacker's own requests are charged to nobody else."""
    assert place.honest.answers > len(ATTACKS)
    ledger = Ledger(f"sqlite:///{place.folder / 'verbatim.db'}", time.time)
    try:
        assert ledger.check() == []
    finally:
        ledger.close()


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[Server]:
    """A server without keys, as most people run it."""
    folder = tmp_path_factory.mktemp("open")
    write(folder, tiny("qwen3"))
    with start([], folder) as server:
        yield server


@pytest.mark.parametrize("attack", [*PAGES, *REBINDING], ids=lambda attack: attack.name)
def test_a_page_in_a_browser_is_no_client(open_server: Server, attack: Attack) -> None:
    assert set(attack.send(Target(open_server.port))) <= attack.right


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_an_engine_that_is_stopped_is_said(
    tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, isolation: str
) -> None:
    """A step that never ends: readiness says so, life goes on, and who waits is told at the end."""
    write(tmp_path, tiny("qwen3"), shutdown_seconds=1)
    entry = json.loads((tmp_path / "models.yaml").read_text())
    entry["models"][0] |= {"stall_timeout": 0.5, "isolation": isolation}
    (tmp_path / "models.yaml").write_text(json.dumps(entry))
    where = "'serve' in sys.orig_argv" if isolation == "thread" else "'process.child' in ' '.join(sys.orig_argv)"
    stuck = (
        "import sys, threading\n"
        f"if {where}:\n"
        "    import engine.engine as e\n"
        "    step = e.Engine.step\n"
        "    def stop(self):\n"
        "        threading.Event().wait(120) if self.has_work and b'STOP' in open('stop', 'rb').read() else None\n"
        "        return step(self)\n"
        "    e.Engine.step = stop\n"
    )
    (tmp_path / "stop").write_text("")
    (tmp_path / "sitecustomize.py").write_text(stuck)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with start([], tmp_path) as server:
        target = Target(server.port)
        assert post(target, request(target)) == ["200"]
        (tmp_path / "stop").write_text("STOP")
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as waiting:
            body = request(target)
            waiting.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            waiting.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            deadline = time.monotonic() + 60
            while get(target, "/health/ready") != "503":
                assert time.monotonic() < deadline, "nobody noticed that the engine stands still"
            assert "stalled" in httpx.get(f"{server.url}/health/ready").text
            assert get(target, "/health/live") == "200"
            server.process.send_signal(signal.SIGTERM)
            assert answer_of(waiting) == "503", "who waits for it is told"
            assert server.process.wait(60) == 0, "a step that never ends must not keep the process from ending"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of address space on Windows")
@pytest.mark.parametrize("gib", [1, 3])
def test_too_little_memory_is_a_sentence(tmp_path: Path, tiny: Callable[[str], Path], gib: int) -> None:
    """Under `ulimit -v` the server serves or says what is missing: no traceback, no signal."""
    write(tmp_path, tiny("qwen3"))
    command = f"ulimit -v {gib * 2**20}; exec {sys.executable} -c 'from server.cli import main; main()' generate hello"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode in (0, 1, 2), f"{done.returncode}: {said[-2000:]}"
    with contextlib.suppress(StopIteration):
        pytest.fail(next(line for line in said.splitlines() if "Traceback" in line) + said[-2000:])

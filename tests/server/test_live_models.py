"""Models that come and go in a real server: a changed file under load, and loads and unloads without growth."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import Server, start

from engine import ModelConfig

pytestmark = pytest.mark.slow

GROWTH = 24 * 2**20
"""Bytes that may come on top after the first three cycles; the model's weights alone take 20 MiB in each."""
TINY = "cache_size: 8MiB, context_length: 256"


def write(folder: Path, *entries: str, server: str = "") -> None:
    lines = "\n".join(f"  - {{{entry}, {TINY}}}" for entry in entries)
    (folder / "models.yaml").write_text(f"models:\n{lines}\n{server}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write(tmp_path, "id: noise, builtin: noise", "id: demo, builtin: demo, load: on_demand")
    with start([], tmp_path) as running:
        yield running


def ask(server: Server, model: str, seed: int = 5) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "seed": seed}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def state(server: Server, model: str) -> str:
    return str(httpx.get(f"{server.url}/v1/models/{model}", timeout=60).json().get("state"))


def until(condition: Callable[[], bool], server: Server) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)


def test_a_changed_file_under_load_changes_no_reply_and_fails_none(server: Server, tmp_path: Path) -> None:
    """The entry that all requests go to is replaced twice, while others come, go and are mistyped."""
    expected = {seed: ask(server, "noise", seed).json()["choices"] for seed in range(3)}
    replies: list[httpx.Response] = []
    done = threading.Event()

    def client(number: int) -> None:
        while not done.is_set():
            seed = (len(replies) + number) % 3
            replies.append(ask(server, "noise", seed))
            assert replies[-1].status_code != 200 or replies[-1].json()["choices"] == expected[seed]

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for one in clients:
        one.start()

    def reload(*entries: str, told: str) -> None:
        write(tmp_path, *entries)
        before = server.log.read_text().count("SIGHUP")
        os.kill(server.process.pid, signal.SIGHUP)
        until(lambda: server.log.read_text().count("SIGHUP") > before, server)
        assert told in server.log.read_text(), server.log.read_text()

    try:
        reload("id: noise, builtin: noise, max_sequences: 3", "id: new, builtin: noise", told="replaced: noise")
        until(lambda: state(server, "new") == "ready", server)
        assert ask(server, "new").status_code == 200
        reload("id: noise, builtin: noise, max_sequence: 4", told="did you mean 'max_sequences'")
        assert state(server, "new") == "ready"
        reload("id: noise, builtin: noise, max_sequences: 5", told="removed: new")
        until(lambda: ask(server, "new").status_code == 404, server)
        until(lambda: httpx.get(f"{server.url}/v1/models/noise").json()["max_sequences"] == 5, server)
    finally:
        done.set()
        for one in clients:
            one.join(60)
    assert {reply.status_code for reply in replies} == {200}, server.log.read_text()
    assert [ask(server, "noise", seed).json()["choices"] for seed in range(3)] == list(expected.values())
    assert server.stop() == 0


@pytest.mark.skipif(
    "isolation" not in ModelConfig.model_fields, reason="only a process of its own gives all memory back"
)
@pytest.mark.parametrize("cycles", [10, pytest.param(20, marks=pytest.mark.sweep)])
def test_cycles_of_load_and_unload_without_growth(server: Server, cycles: int) -> None:
    process = psutil.Process(server.process.pid)
    sizes, replies = [], []
    for _ in range(cycles):
        replies.append(ask(server, "demo").json()["choices"])
        assert state(server, "demo") == "ready"
        answer = httpx.post(f"{server.url}/v1/models/demo/unload", json={"wait_seconds": 20}, timeout=60)
        assert (answer.status_code, answer.json()["state"]) == (200, "unloaded"), answer.text
        everybody = [process, *process.children(recursive=True)]
        sizes.append(sum(one.memory_info().rss for one in everybody))
    assert replies == [replies[0]] * cycles
    assert sizes[-1] - sizes[2] < GROWTH, [size >> 20 for size in sizes]
    assert server.stop() == 0

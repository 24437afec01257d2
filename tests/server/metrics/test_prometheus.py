"""A real Prometheus scrapes a real server, and its figures are those of the ledger and of the replies."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import Server, start

from server.ledger.store import Ledger

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus here (Debian: apt-get install prometheus)"),
]
BOUND = 120.0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def prometheus(target: str, secret: str, folder: Path) -> Iterator[str]:
    """Run it until the block ends; yields its address."""
    folder.mkdir()
    config, port = folder / "prometheus.yml", free_port()
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        "  - job_name: verbatim\n"
        f"    authorization: {{credentials: {secret}}}\n"
        f"    static_configs: [{{targets: ['{target}']}}]\n"
    )
    assert PROMETHEUS is not None
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def ask(address: str, query: str) -> float | None:
    """The one value that a query has; None while there is none."""
    with contextlib.suppress(httpx.TransportError):
        found = httpx.get(f"{address}/api/v1/query", params={"query": query})
        if found.status_code == 200 and (result := found.json()["data"]["result"]):
            [one] = result
            return float(one["value"][1])
    return None


def until(address: str, query: str, value: float) -> None:
    deadline, found = time.monotonic() + BOUND, None
    while (found := ask(address, query)) != value:
        assert time.monotonic() < deadline, (query, found, value)
        time.sleep(0.3)


def use(server: Server, secret: str) -> list[dict[str, int]]:
    """Some replies, whole, streamed and left. Returns the usage of those that tell it."""
    headers, told = {"authorization": f"Bearer {secret}"}, []
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        for i in range(3):
            body = {"model": "noise", "messages": [{"role": "user", "content": "Hi" * 40}], "max_tokens": 8 + i, "n": 2}
            told.append(client.post("/v1/chat/completions", json=body).json()["usage"])
        stream = {**body, "stream": True}
        assert client.post("/v1/chat/completions", json=stream).text.endswith("data: [DONE]\n\n")
        with client.stream(
            "POST", "/v1/chat/completions", json={**stream, "max_tokens": 400, "ignore_eos": True}
        ) as left:
            next(left.iter_lines())
        assert client.post("/v1/chat/completions", json={**body, "temperature": 9}).status_code == 422
    return told


def test_its_figures_are_those_of_the_ledger(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "models.yaml").write_text("models:\n  - {id: noise, builtin: noise}\nserver: {ledger: keys.db}\n")
    ledger = Ledger(f"sqlite:///{folder / 'keys.db'}", time.time)
    root, ada = ledger.create_key("root", admin=True), ledger.create_key("ada")
    with start([], folder) as server, prometheus(f"127.0.0.1:{server.port}", root.secret, tmp_path / "it") as address:
        until(address, "up", 1)
        told = use(server, ada.secret)
        until(address, "sum(verbatim:replies_total)", 5)
        deadline = time.monotonic() + BOUND
        while not (rows := ledger.usage()) or rows[0]["requests"] < 5:
            assert time.monotonic() < deadline, rows
            time.sleep(0.1)
        [row] = rows
        assert row["completion_tokens"] > sum(usage["completion_tokens"] for usage in told)
        for metric, column in (
            ("prompt_tokens_total", "prompt_tokens"),
            ("prefix_cache_hits_total", "cached_tokens"),
            ("generation_tokens_total", "completion_tokens"),
        ):
            until(address, f'verbatim:{metric}{{model_name="noise"}}', row[column])
        until(address, 'verbatim:replies_total{outcome="complete"}', 4)
        until(address, 'verbatim:request_success_total{finished_reason="length"}', 8)
        until(address, 'verbatim:refusals_total{status="422"}', 1)
        until(address, "verbatim:time_to_first_token_seconds_count", 5)
        until(address, 'verbatim:model_state{state="ready"}', 1)
        until(address, "verbatim:ledger_up", 1)
    ledger.close()

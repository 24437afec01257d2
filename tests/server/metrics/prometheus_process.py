"""A real Prometheus, for tests: runs it, asks it, waits for a figure."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

PROMETHEUS = shutil.which("prometheus")
MISSING = "there is no prometheus here (Debian: apt-get install prometheus)"
BOUND = 120.0


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def prometheus(target: str, secret: str, folder: Path) -> Iterator[str]:
    """Run it until the block ends, scraping once a second; yields its address."""
    folder.mkdir()
    config, port = folder / "prometheus.yml", _free_port()
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
            process.wait(60)


def results(address: str, query: str) -> list[dict[str, Any]]:
    """The vector that a query has now; empty while Prometheus starts.

    Raises:
        AssertionError: Prometheus refuses the query.
    """
    try:
        found = httpx.get(f"{address}/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if found.status_code == 503:
        return []
    assert found.status_code == 200, found.text
    vector: list[dict[str, Any]] = found.json()["data"]["result"]
    return vector


def until(address: str, query: str, value: float) -> None:
    """Wait until a query has one result, and that value."""
    deadline, found = time.monotonic() + BOUND, None
    while found != value:
        assert time.monotonic() < deadline, (query, found, value)
        time.sleep(0.3)
        if result := results(address, query):
            [one] = result
            found = float(one["value"][1])

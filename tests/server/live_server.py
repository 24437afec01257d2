"""A real server in a process of its own, for tests that need what a user has."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import OpenAI


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, prefix: str = "/v1", **options: object) -> OpenAI:
        return OpenAI(base_url=self.url + prefix, api_key="none", max_retries=0, timeout=60, **options)  # type: ignore[arg-type]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def start(arguments: list[str], folder: Path) -> Iterator[Server]:
    """Run `verbatim serve` on a free port until the block ends; ready when it says so."""
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", "0", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**os.environ, "COLUMNS": "200"},
        )
        server = Server(process, 0, log)
        try:
            server.port = int(_wait_for(server, "http://127.0.0.1:").split("http://127.0.0.1:")[1].split()[0])
            deadline = time.monotonic() + 240
            while httpx.get(f"{server.url}/health/ready", timeout=60).status_code != 200:  # the first waits for imports
                assert time.monotonic() < deadline, log.read_text()
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield server
        finally:
            server.stop()


def _wait_for(server: Server, text: str) -> str:
    deadline = time.monotonic() + 120
    while text not in (said := server.log.read_text()):
        assert time.monotonic() < deadline, said
        assert server.process.poll() is None, said
        time.sleep(0.05)
    return said

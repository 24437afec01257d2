"""A verbatim server as a child process on a free loopback port, and the load client beside it. Parses no flags."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT, child_environment
from benchmarks.load import Job

MODEL = "bench"
"""The id under which a started server offers its model."""
_READY_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers.

    Attributes:
        log: what it prints, as long as it runs.
    """

    base_url: str
    pid: int
    log: Path


@contextlib.contextmanager
def serve(model: Path, *, meter: Path | None = None, **entry: Any) -> Iterator[Served]:
    """Start `verbatim serve` on a checkpoint, wait until it is ready, stop it at the end by its own handle.

    Args:
        meter: where `benchmarks.metered` writes the forward pass's CPU time; None: the plain command.
        entry: further keys of its models.yaml entry.

    Raises:
        RuntimeError: it ended or was not ready in time; with its last words.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        config = Path(scratch, "models.yaml")
        # JSON is YAML.
        config.write_text(json.dumps({"models": [{"id": MODEL, "path": str(model.resolve()), **entry}]}))
        plain = ["-c", "from server.cli import main; main()"]
        start = plain if meter is None else ["-m", "benchmarks.metered", str(meter)]
        command = [sys.executable, *start, "serve", "--config", str(config), "--host", "127.0.0.1"]
        yield stack.enter_context(run(command, "/health/ready"))


@contextlib.contextmanager
def run(command: list[str], ready: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """Start a server that takes `--port`, wait until the path `ready` answers 200, stop it by its own handle.

    Raises:
        RuntimeError: it ended or was not ready in time; with its last words.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        log_path = Path(scratch, "log")
        log = stack.enter_context(log_path.open("w"))
        port = _free_port()
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=ROOT,
            env=child_environment(**(environment or {})),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            if not _becomes_ready(process, f"http://127.0.0.1:{port}{ready}"):
                raise RuntimeError(f"{command[0]} did not start:\n{log_path.read_text()[-2000:]}")
            yield Served(f"http://127.0.0.1:{port}/v1", process.pid, log_path)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(process.pid).resume()  # a stopped process does not see that it is to end
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def ask(base_url: str, bodies: list[dict[str, Any]], streams: int, seconds: float, api_key: str = "") -> dict[str, Any]:
    """Run the load client; what `benchmarks.load.run` returns.

    Raises:
        RuntimeError: the client failed, or a request had no complete answer.
    """
    job = Job(base_url, bodies, streams, seconds, api_key)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        cwd=ROOT,
        env=child_environment(),
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        timeout=seconds + 90,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the load client failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    errors = [a["error"] for a in result["answers"] if a["error"]]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(result['answers'])} requests failed: {errors[0]}")
    return result


def words(count: int, number: int) -> str:
    """A text of about `count` tokens that no other number begins with, so that no prefix cache knows it."""
    text = " ".join(f"{(number * 7919 + i * i * 31) % 997}" for i in range(count // 2))
    return f"{number} {text}"


def chat(model: str, text: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    """The body of a streamed request that ends after exactly `max_tokens` tokens."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _becomes_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Whether it answers 200 before it ends, or says that a model failed, or the time is over."""
    deadline = time.monotonic() + _READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return True
        except urllib.error.HTTPError as error:
            if f'"{MODEL}":"failed: '.encode() in error.read().replace(b'": "', b'":"'):
                return False
        except OSError:
            pass
        time.sleep(0.1)
    return False

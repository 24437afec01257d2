"""A contestant in a process of its own: one JSON command a line on stdin, one JSON answer a line on stdout.

    python -m benchmarks.worker NAME --model DIR --threads N

`Worker` is the other end. It starts the process, asks, and stops it by its own handle, whatever happens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, child_environment, peak_rss_bytes, rss_bytes

TIMEOUT = 900.0
"""Seconds after which an answer is no longer waited for."""


class Worker:
    """A running contestant. Use as a context manager."""

    def __init__(self, name: str, model: Path, threads: int, root: Path = ROOT) -> None:
        """root: a folder that holds the package `engine`; this checkout's by default."""
        command = [sys.executable, "-m", "benchmarks.worker", name, "--model", str(model), "--threads", str(threads)]
        self.name = name
        environment = child_environment(PYTHONPATH=str(ROOT))
        self._process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Carry out a command there.

        Raises:
            RuntimeError: the process ended or did not answer in time; its own words are on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(TIMEOUT, self._process.kill)  # a pipe has no timeout of its own
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            raise RuntimeError(f"the {self.name} worker ended during {do!r} (status {self._process.wait(10)})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end; after ten seconds, make it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


def main() -> None:
    from benchmarks.contestants import CONTESTANTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CONTESTANTS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    contestant = CONTESTANTS[arguments.name](arguments.model, arguments.threads)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not look like an answer
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "memory":
            answer = {"rss": rss_bytes(), "peak": peak_rss_bytes()}
        else:
            answer = getattr(contestant, do)(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""How long a user looks at an empty terminal: `verbatim --version`, and the first line of `verbatim serve`.

    python benchmarks/startup.py [--rounds 10]

Each is a process of its own, from its start to the first line it prints; medians and the slowest of some rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOALS = {"version": 0.2, "serve": 0.3}
"""Seconds."""
_MAIN = "from server.cli import main; main()"


def first_line(arguments: list[str], folder: str) -> float:
    """Seconds from the start of a process to its first line."""
    root = str(Path(__file__).resolve().parents[1])
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
    if not line.startswith("verbatim "):
        raise SystemExit(f"unexpected: {line!r}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models.yaml").write_text("models:\n  - {id: demo, builtin: demo}\nserver: {port: 0}\n")
        for name, arguments in (("version", ["--version"]), ("serve", ["serve"])):
            first_line(arguments, folder)  # compiles modules, fills the system's cache
            times = [first_line(arguments, folder) for _ in range(rounds)]
            found[name] = {"median": statistics.median(times), "slowest": max(times), "goal": GOALS[name]}
    print(json.dumps({**found, "load": os.getloadavg()[0]}, indent=1))


if __name__ == "__main__":
    main()

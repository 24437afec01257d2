"""What a process for each model costs: two servers, `isolation: process` and `thread`, asked in turns.

    python benchmarks/isolation.py [--model DIR] [--streams 8] [--tokens 256] [--repeat R] [--out DIR] [--quick]

By default on the noise checkpoint, where a step takes so little that the hand-over is seen. CPU of all processes and
threads of a server, system time included; the client is a process of its own. Says nothing about how fast a model is.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from benchmarks import machine, real_model, served
from benchmarks.common import RESULTS, alternate, ratios, summary, thread_cpu_seconds
from benchmarks.place import tree_bytes
from benchmarks.report import Report
from engine.checkpoints.checkpoint import prepare_environment
from engine.checkpoints.noise_checkpoint import ensure_noise_checkpoint

KINDS = ("process", "thread")


def tree_cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its children, threads that have ended aside."""
    process = psutil.Process(pid)
    return sum(sum(thread_cpu_seconds(one.pid).values()) for one in (process, *process.children(recursive=True)))


def measure(report: Report, model: Path, streams: int, tokens: int, repeat: int) -> None:
    """Ask both servers the same in every repetition, and only one at a time."""
    cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
    memory: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with contextlib.ExitStack() as stack:
        entry = {"device": "cpu", "threads": 1, "max_sequences": streams}
        running = {kind: stack.enter_context(served.serve(model, isolation=kind, **entry)) for kind in KINDS}

        def ask(kind: str) -> Callable[[int], float]:
            def once(number: int) -> float:
                texts = (served.words(16, number * streams + i) for i in range(streams))
                bodies = [served.chat(served.MODEL, text, tokens) for text in texts]
                before = tree_cpu_seconds(running[kind].pid)
                result = served.ask(running[kind].base_url, bodies, streams, 120)
                count = sum(answer["tokens"] for answer in result["answers"])
                cpu[kind].append((tree_cpu_seconds(running[kind].pid) - before) * 1e6 / count)
                memory[kind].append(tree_bytes(running[kind].pid) / 2**20)
                return float(count / result["seconds"])

            return once

        speeds = alternate({kind: ask(kind) for kind in KINDS}, repeat + 1)
    # The first repetition warms up.
    name = f"{streams} streams"
    for title, unit, found in (
        (f"speed, {name}", "tokens/s", speeds),
        (f"CPU, {name}", "µs CPU/streamed token", cpu),
        ("resident memory, shared pages counted in each process", "MiB", memory),
    ):
        report.add(
            title,
            unit,
            {kind: summary(found[kind][1:]) for kind in KINDS},
            ratio=ratios(found["process"][1:], found["thread"][1:]),
            ratio_of="process / thread",
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, help="a checkpoint's folder, or smollm2; default: noise")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each stream")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.streams, arguments.tokens, arguments.repeat = 2, 16, 1
    prepare_environment(pull=False)
    model = arguments.model or ensure_noise_checkpoint()
    label = "noise" if arguments.model is None else model.resolve().name
    settings = {"streams": arguments.streams, "tokens": arguments.tokens, "repeat": arguments.repeat}
    commit, dirty = machine.commit()
    where = machine.describe(threads=1)
    report = Report("isolation", label, machine.utc_now(), commit, dirty, where, settings, arguments.quick)
    measure(report, model, arguments.streams, arguments.tokens, arguments.repeat)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()

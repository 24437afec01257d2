"""Examine many architectures, two at a time, each in a process that may crash or hang without ending the others.

`python -m zoo.sweep [NAME…] [--json FILE] [--page FILE] [--generate] [--quick]` (with `tests` in the path).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

from zoo.examine import Case, Finding, examine, quiet
from zoo.page import page
from zoo.tiny import NAMES

PROCESSES = 2
SECONDS = 240
"""After which an architecture counts as hanging."""


class Sweep:
    """Examines cases in the background; `findings` has a future for each of them."""

    def __init__(self, cases: Sequence[Case], processes: int = PROCESSES) -> None:
        self._workers = [_Worker() for _ in range(processes)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._pool = ThreadPoolExecutor(processes)
        self.findings: dict[Case, Future[Finding]] = {case: self._pool.submit(self._one, case) for case in cases}

    def _one(self, case: Case) -> Finding:
        worker = self._free.get()
        try:
            return worker.examine(case)
        finally:
            self._free.put(worker)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._pool.shutdown()


class _Worker:
    """A process that examines one case after the other; started again after a crash."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def examine(self, case: Case) -> Finding:
        pipe = self._running()
        start = time.monotonic()
        try:
            pipe.send(case)
            if pipe.poll(SECONDS):
                return Finding(**pipe.recv())
            said = f"nothing was heard of it for {SECONDS} seconds"
        except (EOFError, OSError):
            said = "its process died"
        self.close()
        return Finding(case.name, status="crashed", reason=said, seconds=round(time.monotonic() - start, 1))

    def _running(self) -> Connection:
        if self._pipe is None or self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self._pipe

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    quiet()
    while True:
        pipe.send(dataclasses.asdict(examine(pipe.recv())))


def main() -> None:
    parser = argparse.ArgumentParser(description="Examine architectures; all if none are named.")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path, help="write the findings, one a line")
    parser.add_argument("--generate", action="store_true", help="try transformers' own cached generation, too")
    parser.add_argument(
        "--quick", action="store_true", help="compare bits in one circumstance, and not in the fallback runner"
    )
    parser.add_argument("--page", type=Path, help="write the page of results")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    lines, findings = [], []
    cases = [Case(n, thorough=not options.quick, generate=options.generate) for n in options.names or NAMES]
    with Sweep(cases) as sweep:
        for number, future in enumerate(sweep.findings.values(), 1):
            finding = future.result()
            findings.append(finding)
            lines.append(json.dumps(dataclasses.asdict(finding)) + "\n")
            print(f"{number}/{len(sweep.findings)} {finding.summary()}", flush=True)
            if options.json:
                options.json.write_text("".join(lines), encoding="utf-8")
    if options.page:
        options.page.write_text(page(findings), encoding="utf-8")


if __name__ == "__main__":
    main()

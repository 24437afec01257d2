"""Decoding beside others: busy processes on the same processors, and models that are loaded but idle.

    python benchmarks/busy.py --model DIR [--threads N] [--repeat R] [--quantization int8|int4] [--base COMMIT]

Tokens per second of one stream, alone and beside as many busy processes as there are processors; and with one model
loaded and with three of which two do nothing, in one process and in processes of their own. `--base` names a commit
whose engine is measured in the same run, from git. Measures no HTTP and no text.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, ROOT, alternate, fixed_prompt, ratios, summary
from benchmarks.report import Report
from benchmarks.worker import Worker
from engine.checkpoints.checkpoint import inspect

OURS = "verbatim"
SLOWER, COST = 2.5, 0.03
"""The goals: how much slower beside as many busy processes as processors; what idle models may cost."""


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that do nothing but compute; none outlives this one."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}:\n for _ in range(10**6): pass"
    hogs = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(count)]
    try:
        time.sleep(0.5)  # they start, and the scheduler spreads them
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def tree_of(commit: str, folder: Path) -> Path:
    """The engine of another commit, unpacked into `folder`."""
    packed = subprocess.run(["git", "archive", commit, "engine"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Run:
    """One run: what is compared, the settings, the report that grows."""

    def __init__(self, arguments: argparse.Namespace, roots: dict[str, Path]) -> None:
        self.model, self.threads = arguments.model, arguments.threads
        self.steps, self.repeat, self.quantization = arguments.steps, arguments.repeat, arguments.quantization
        self.roots = roots
        self.quick = bool(arguments.quick)
        config = inspect(self.model, self.model.name).config
        self.vocab_size = int(config.get("text_config", config)["vocab_size"])
        settings = {
            "repeat": self.repeat,
            "decode_steps": self.steps,
            "quantization": self.quantization,
            "busy_processes": machine.usable_cores(),
            "base": arguments.base,
        }
        label = arguments.label or arguments.model.resolve().name
        self.report = Report(
            "busy", label, machine.utc_now(), *machine.commit(), machine.describe(self.threads), settings,
            self.quick,
        )  # fmt: skip

    @contextlib.contextmanager
    def loaded(self, root: Path, models: int = 1) -> Iterator[Worker]:
        """A process that has loaded the model, several times over if told so; the first of them is measured."""
        with Worker(OURS, self.model, self.threads, root) as worker:
            worker.ask("load", quantization=self.quantization)
            for _ in range(models - 1):
                worker.ask("load_idle", quantization=self.quantization)
            yield worker

    def speed(self, worker: Worker, number: int) -> float:
        """Tokens per second of one greedy stream after a short prompt."""
        prompt = fixed_prompt(16, self.vocab_size, number + 1)
        answer = worker.ask("decode", prompts=[prompt], steps=self.steps, sampling={})
        return self.steps / float(answer["seconds"])


def beside_busy_processes(run: Run, workers: dict[str, Worker]) -> None:
    count = machine.usable_cores()

    def crowded(worker: Worker, number: int) -> float:
        with busy(count):
            return run.speed(worker, number)

    cases = {}
    for name, worker in workers.items():
        cases[f"{name}, alone"] = lambda number, w=worker: run.speed(w, number)
        cases[f"{name}, {count} busy"] = lambda number, w=worker: crowded(w, number)
    alternate(cases, 1, first=-1)
    values = alternate(cases, run.repeat)
    for name in workers:
        alone, beside = values[f"{name}, alone"], values[f"{name}, {count} busy"]
        ratio, ours = ratios(alone, beside), name == OURS
        run.report.add(
            f"decode, 1 stream, beside {count} busy processes: {name}",
            "tokens/s",
            {"alone": summary(alone), f"{count} busy": summary(beside)},
            ratio=ratio,
            ratio_of="× slower than alone",
            goal=f"≤ {SLOWER} ×" if ours else "",
            met=ratio["median"] <= SLOWER if ours else None,
        )


def beside_idle_models(run: Run, name: str, root: Path, alone: Worker) -> None:
    """The same model once, three times in one process, and once with two more in processes of their own."""
    with run.loaded(root, 3) as together:
        one_process = {"1 model": alone, "3 in one process": together}
        cases = {case: lambda number, w=worker: run.speed(w, number) for case, worker in one_process.items()}
        alternate(cases, 1, first=-1)
        values = alternate(cases, run.repeat)
    with run.loaded(root), run.loaded(root):  # beside the one at hand and those of other commits, which are idle, too
        case = "3 in processes of their own"
        values |= alternate({case: lambda number: run.speed(alone, number)}, run.repeat + 1, first=-1)
    values[case] = values[case][1:]
    add_idle_models(run, name, values, "3 in one process")


def beside_an_idle_model(run: Run, name: str, alone: Worker) -> None:
    """The same row from the one process that there is: a quick run is to show that this works, not how fast it is."""
    values = alternate({"1 model": lambda number: run.speed(alone, number)}, run.repeat)
    alone.ask("load_idle", quantization=run.quantization)
    values |= alternate({"2 in one process": lambda number: run.speed(alone, number)}, run.repeat)
    add_idle_models(run, name, values, "2 in one process")


def add_idle_models(run: Run, name: str, values: dict[str, list[float]], several: str) -> None:
    ratio, goal = ratios(values[several], values["1 model"]), 1 - COST
    run.report.add(
        f"decode, 1 stream, {int(several[0]) - 1} more loaded but idle: {name}",
        "tokens/s",
        {case: summary(v) for case, v in values.items()},
        ratio=ratio,
        ratio_of="× one model (in one process)",
        goal=f"≥ {goal:.2f} ×" if name == OURS else "",
        met=ratio["median"] >= goal if name == OURS else None,
    )


def measure(run: Run) -> None:
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(run.loaded(root)) for name, root in run.roots.items()}
        beside_busy_processes(run, workers)
        for name, root in run.roots.items():
            if run.quick:
                beside_an_idle_model(run, name, workers[name])
            else:
                beside_idle_models(run, name, root, workers[name])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--base", metavar="COMMIT", help="measure this commit's engine, too")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.repeat = 8, 1
    with tempfile.TemporaryDirectory() as folder:
        roots = {OURS: ROOT}
        if arguments.base:
            roots[f"commit {arguments.base}"] = tree_of(arguments.base, Path(folder))
        os.environ.pop("OMP_NUM_THREADS", None)
        run = Run(arguments, roots)
        measure(run)
    run.report.show()
    if arguments.out or not arguments.quick:
        print(run.report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()

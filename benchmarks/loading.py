"""What loading takes: seconds until a model could serve, and the memory at its highest against the memory that stays.

    python benchmarks/loading.py --model DIR [--quantization int8 int4] [--gguf FILE …] [--threads N] [--repeat R]

Every load is a process of its own, which ends afterwards; what it imports counts on both sides. Loads take turns, every
other round in reverse order; a first round, which reads the files into the system's cache, is discarded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, ratios, summary
from benchmarks.goals import PEAK
from benchmarks.report import Report
from benchmarks.rivals import OURS, kind_of
from benchmarks.worker import Worker
from engine.errors import LoadError

AS_IT_IS = "as it is"
Case = tuple[Path, str | None]


def cases_of(arguments: argparse.Namespace) -> dict[str, Case]:
    """Return what is loaded, by name: a checkpoint or GGUF file, and the `quantization` of its entry."""
    cases: dict[str, Case] = {AS_IT_IS: (arguments.model, None)}
    cases |= {kind: (arguments.model, kind) for kind in arguments.quantization}
    return cases | {f"GGUF {kind_of(file)}": (file, None) for file in arguments.gguf}


def loaded(case: Case, threads: int) -> dict[str, float]:
    """Load once in a child: its `seconds`, and in bytes its memory's `peak` and what is `resident`."""
    path, quantization = case
    with Worker(OURS, path, threads) as worker:
        seconds = worker.ask("load", quantization=quantization)["seconds"]
        memory = worker.ask("memory")
    return {"seconds": seconds, "peak": memory["peak"], "resident": memory["rss"]}


def measure(cases: dict[str, Case], threads: int, repeat: int, warm: bool) -> dict[str, list[dict[str, float]]]:
    """Load all in turns; without the first round if it only warms up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(repeat + warm):
        for name in list(cases) if number % 2 == 0 else list(cases)[::-1]:
            found[name].append(loaded(cases[name], threads))
    return {name: values[warm:] for name, values in found.items()}


def tell(report: Report, found: dict[str, list[dict[str, float]]]) -> None:
    """A row of seconds, and a row of memory for each way to load."""

    def of(name: str, key: str, unit: float = 1.0) -> list[float]:
        return [one[key] / unit for one in found[name]]

    report.add("load", "s", {name: summary(of(name, "seconds")) for name in found}, note="from the folder to ready.")
    for name in found:
        ratio = ratios(of(name, "peak"), of(name, "resident"))
        sizes: dict[str, Any] = {key: summary(of(name, key, 2**30)) for key in ("peak", "resident")}
        report.add(
            f"memory while loading: {name}",
            "GiB",
            sizes,
            ratio=ratio,
            ratio_of="× what stays resident",
            goal=f"≤ {PEAK:g} ×",
            met=ratio["median"] <= PEAK,
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label", help="the model's name in the report")
    parser.add_argument("--quantization", nargs="*", default=[], choices=["int8", "int4"], help="load so, too")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="GGUF files of the same model")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="loads each once; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    try:
        cases = cases_of(arguments)
    except LoadError as error:
        parser.error(error.message)
    repeat = 1 if arguments.quick else arguments.repeat
    report = Report(
        "loading",
        arguments.label or arguments.model.resolve().name,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(arguments.threads),
        {"repeat": repeat},
        arguments.quick,
    )
    tell(report, measure(cases, arguments.threads, repeat, warm=not arguments.quick))
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()

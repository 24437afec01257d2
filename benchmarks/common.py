"""What all runners share: statistics over alternating repetitions, process meters, fixed prompts, paths.

Knows nothing of engines or servers; imports no torch, so that a worker process decides for itself when to load it.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Summary = dict[str, float]
"""`median`, `min`, `max` and `n` of some repetitions."""


def summary(values: Sequence[float]) -> Summary:
    """The median, with the whole range as the statement of noise."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": float(len(values))}


def alternate(cases: Mapping[str, Callable[[int], float]], repeat: int, first: int = 0) -> dict[str, list[float]]:
    """Run every case once per repetition; every other repetition in reverse order.

    Whatever drifts during a run (temperature, a neighbour's load) then falls on all cases alike. Each case is given the
    repetition's number, from `first` on, so that all cases of one repetition can work on the same input.
    """
    values: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(first, first + repeat):
        order = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in order:
            values[name].append(cases[name](number))
    return values


def ratios(above: Sequence[float], below: Sequence[float]) -> Summary:
    """The ratio within each repetition, then its median: closer to the truth than a ratio of medians under drift."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def fixed_prompt(length: int, vocab_size: int, number: int) -> list[int]:
    """`length` token ids that look arbitrary and are the same in every run; two numbers share no beginning.

    The last tenth of the vocabulary is left out: special tokens and rows without a token stand there.
    """
    usable = max(vocab_size * 9 // 10, 2)
    state = (number + 1) * 2654435761 % 2**32
    ids = []
    for _ in range(length):
        state = (1664525 * state + 1013904223) % 2**32  # Numerical Recipes' generator: the high bits are good enough
        ids.append((state >> 8) % usable)
    # Not left to chance: with a small vocabulary, two prompts may begin alike and share a block of the prefix cache.
    return [number % usable, *ids[1:]]


def rss_bytes(pid: int | None = None) -> int:
    """Resident memory now: mapped files count as far as they are in memory."""
    return int(psutil.Process(pid).memory_info().rss)


def peak_rss_bytes(pid: int | None = None) -> int:
    """The most that a process held in memory at any time; this one by default. Linux, and macOS for itself."""
    if pid is not None:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"the system does not tell the peak memory of process {pid}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def thread_cpu_seconds(pid: int) -> dict[int, float]:
    """CPU seconds of every living thread of a process, by thread id.

    Linux' schedstat counts nanoseconds; elsewhere psutil's times, which count hundredths of a second.
    """
    tasks = Path(f"/proc/{pid}/task")
    if not (tasks / str(pid) / "schedstat").exists():
        return {t.id: t.user_time + t.system_time for t in psutil.Process(pid).threads()}
    found = {}
    for task in tasks.iterdir():
        try:
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:  # the thread has just ended
            continue
    return found


def child_environment(**extra: str) -> dict[str, str]:
    """This environment for a child: offline, quiet, and without settings of the kernels that one contestant makes."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR", "PYTHONPATH")}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**environment, **quiet, **extra}

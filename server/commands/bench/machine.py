"""Measure what bounds a model on a CPU: memory bandwidth for decoding, arithmetic for prompts; estimate from both."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["SIZES", "Estimate", "Machine", "estimate", "measure_machine"]

_BYTES: Final = 64 << 20  # of each thread's array: more than a cache holds
_SECONDS: Final = 1.5
_SIDE: Final = 1024  # of the square matrices
SIZES: Final = (0.135, 0.6, 1.7, 4.0, 8.0)
"""Billions of parameters."""
_READ: Final = 0.75
"""Share of the bandwidth that decoding one stream reaches: about what benchmarks/README.md tells of a 0.6B model."""
_COMPUTED: Final = 0.7
"""Share of a matrix product's speed that a long prompt reaches: an estimate."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`bandwidth`: bytes read per second; `speed`: float32 operations per second of a matrix product."""

    bandwidth: float
    speed: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What to expect of a model on this CPU, in bfloat16: tokens per second, and bytes of memory."""

    billions: float
    decode_rate: float
    prompt_rate: float
    memory_bytes: float


def measure_machine() -> Machine:
    """Measure for a few seconds, on all processors."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arrays = [np.ones(_BYTES // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < _SECONDS:
            list(pool.map(np.max, arrays))  # reads every number; releases the interpreter's lock
            count += 1
        bandwidth = count * threads * _BYTES / (time.perf_counter() - began)
    a = np.ones((_SIDE, _SIDE), np.float32)
    a @ a
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS:
        a @ a
        count += 1
    return Machine(bandwidth, count * 2 * _SIDE**3 / (time.perf_counter() - began))


def estimate(machine: Machine, billions: float) -> Estimate:
    """Estimate a dense model: each token reads every weight once, and takes two operations a weight."""
    weights = billions * 1e9
    size = 2 * weights
    return Estimate(billions, machine.bandwidth * _READ / size, machine.speed * _COMPUTED / size, size * 1.5)

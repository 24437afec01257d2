"""Ask torch about GPUs, and make one the calling thread's. Decides nothing; knows no model.

The only file of the engine that asks for a GPU's memory and kind, so that a test without one puts numbers in its place.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

__all__ = [
    "CAPTURE",
    "DeviceMemory",
    "DeviceStream",
    "computes_bfloat16",
    "count",
    "matmul_tf32",
    "properties",
    "recording_stream",
    "release_cache",
    "wait_for",
]

CAPTURE: Final = threading.RLock()
"""Held while any thread of this process captures a CUDA graph. Giving memory back and waiting for a whole GPU are not
allowed meanwhile, on any stream: torch's allocator asserts, and CUDA may end the capture."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of one GPU, in bytes."""

    device: torch.device

    @classmethod
    def of_all(cls) -> tuple[DeviceMemory, ...]:
        """Return the memory of every GPU that this process sees."""
        return tuple(cls(torch.device("cuda", i)) for i in range(count()))

    def total(self) -> int:
        """Return how much the GPU has."""
        return int(torch.cuda.mem_get_info(self.device)[1])

    def free(self) -> int:
        """Return what nobody has taken; memory that this process holds for reuse counts as taken until `release`."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def allocated(self) -> int:
        """Return what this process's tensors take."""
        return int(torch.cuda.memory_allocated(self.device))

    def held(self) -> int:
        """Return what this process has taken for its tensors, what it keeps for reuse included."""
        return int(torch.cuda.memory_reserved(self.device))

    def peak(self) -> int:
        """Return the most that `held` was since `forget_peak`."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def forget_peak(self) -> None:
        """Count the peak anew."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def release(self) -> None:
        """Wait until the GPU has done what was asked of it, and give back what is kept for reuse."""
        wait_for(self.device)
        release_cache()


class DeviceStream:
    """Where the work of one model is queued: on a GPU a stream of its own, on a CPU nothing.

    CUDA's current device and stream are the calling thread's. A thread that computes a model enters `current`, or its
    kernels would be launched on the first GPU, and wait for those of other models.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device and the stream the calling thread's own inside the `with` block."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def wait_for_all(self) -> None:
        """Wait until the GPU has done what was queued on any stream: weights are read on other threads' streams."""
        if self._stream is not None:
            wait_for(self.device)


def release_cache() -> None:
    """Give back to the GPUs what this process keeps for reuse."""
    gc.collect()  # what holds itself in a cycle holds its tensors, too
    with CAPTURE:
        torch.cuda.empty_cache()


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done everything that was queued.

    Raises:
        RuntimeError: it cannot be used any more, after an illegal address, say.
    """
    with CAPTURE:
        torch.cuda.synchronize(device)


@functools.cache
def recording_stream(device: torch.device) -> Any:
    """Return the stream on which all graphs of a GPU are captured.

    torch has 32 streams of each priority and hands them out in turn: a new one for each capture would soon be one that
    another model is served on. Models are served on streams of the other priority.
    """
    return _new_stream(device, -1)


_new_stream: Callable[[torch.device, int], Any] = torch.cuda.Stream


def count() -> int:
    """Count the GPUs that torch can compute on; 0 without a driver, or with a build of torch for CPUs."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a GPU has instructions for bfloat16; without them torch widens every number."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def matmul_tf32() -> bool:
    """Tell whether torch may round float32 factors of matrix products on a GPU to TF32's ten bits."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def properties(device: torch.device) -> dict[str, str]:
    """Return what the bits computed on a GPU depend on: its kind, CUDA, and the settings that change a sum.

    `cublas`: the workspace of cuBLAS, whose size chooses kernels. `tf32`: which operations may round to TF32.
    """
    major, minor = torch.cuda.get_device_capability(device)
    convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    tf32 = (("products", matmul_tf32()), ("convolutions", convolutions == "tf32"))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "cuda": str(torch.version.cuda),
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
        "tf32": " ".join(name for name, allowed in tf32 if allowed),
    }

"""The backend that needs only torch: for machines without compiled kernels, for narrow dtypes and for GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from engine.compute.backend import PackedChunk, Progress, StepSize
from engine.compute.kv_cache import KVCache, LayerShape
from engine.compute.linear import Make, pack_model
from engine.compute.model_runner import PackedRunner
from engine.compute.processor import processor_model
from engine.compute.torch_attention import TorchPlan
from engine.devices import gpu
from engine.devices.gpu import release_cache
from engine.host_memory import give_back_memory


class TorchBackend:
    """Computes with torch's own operations (see `engine.compute.backend.Backend`)."""

    QUANTIZATIONS: ClassVar[frozenset[str]] = frozenset()
    """What an entry's `quantization` may say."""

    def __init__(self, device: torch.device, linear: str = "torch", make: Make | None = None) -> None:
        """linear, make: the kind of linear layers and what makes them; without `make` the model's own stay."""
        self.device, self.linear, self._make = device, linear, make

    @property
    def breaks_law(self) -> str | None:
        """Name the products of a GPU: the vendor's library picks a kernel by the number of rows.

        Small models pass every trial there (seen on an H100 in bfloat16), and real ones do not.
        """
        return None if self.device.type == "cpu" else "products on a GPU depend on the number of rows"

    @property
    def exact_linear(self) -> Make | None:
        """Make layers of the kind that was chosen."""
        return self._make

    def allocate(self, layers: Sequence[LayerShape], num_blocks: int) -> KVCache:
        """Allocate a cache of plain layout."""
        return KVCache(layers, num_blocks)

    def plan(self, cache: KVCache, chunks: Sequence[PackedChunk]) -> TorchPlan:
        """Plan a step for torch's attention."""
        return TorchPlan(cache, chunks)

    def runner(
        self, model: nn.Module, cache: KVCache, vocab_size: int, size: StepSize, *, serves: bool = False, **trial: Any
    ) -> PackedRunner:
        """Compute steps of any size."""
        return PackedRunner(model, self, cache, vocab_size, **trial)

    def fuse(self, model: nn.Module, *, stored: torch.dtype, length: int, progress: Progress) -> None:
        """Replace the linear layers if a kind was chosen; everything else stays as it is."""
        if self._make is not None:
            pack_model(model, stored, self._make, progress)

    def release_memory(self) -> None:
        """Give freed memory back to the operating system and the GPU."""
        if self.device.type == "cuda":
            release_cache()
        give_back_memory()

    def describe(self) -> Mapping[str, str]:
        """Return the kind of linear layers and the hardware."""
        return {"linear": self.linear, **hardware(self.device)}


def hardware(device: torch.device) -> dict[str, str]:
    """Return the hardware that the bits depend on: a GPU's kind, or a CPU's model and instruction set."""
    if device.type == "cuda":
        return gpu.properties(device)
    return {
        "cpu": processor_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "mkl": os.environ.get("MKL_CBWR", ""),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
    }

"""The CPU backend: computes float32 models with kernels that are compiled for this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from engine.compute.backend import PackedChunk, Progress, StepPlan, StepSize
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.decoder_layer import fuse_layers
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.linear import NativeLinear, merge_shared_projections
from engine.compute.cpu.pointwise import replace_pointwise
from engine.compute.kv_cache import KVCache, LayerShape
from engine.compute.linear import Make, is_sound, is_sound_for, pack_model
from engine.compute.model_runner import PackedRunner
from engine.compute.torch_attention import TorchPlan
from engine.compute.torch_backend import hardware
from engine.host_memory import give_back_memory


class CpuBackend:
    """Computes with compiled kernels (see `engine.compute.backend.Backend`)."""

    QUANTIZATIONS: ClassVar[frozenset[str]] = frozenset({"int8"})
    """What an entry's `quantization` may say."""

    def __init__(self, kernels: Kernels, quantization: str | None = None) -> None:
        """quantization: `int8`, or None to round no weight."""
        self.linear = f"native {quantization}" if quantization else "native"
        self._kernels, self._quantization = kernels, quantization
        self._make = partial(NativeLinear, kernels, quantization or "exact")

    @property
    def breaks_law(self) -> None:
        """None: each number of a result has a chain of operations of its own (kernels.c)."""

    @property
    def exact_linear(self) -> Make:
        """Make layers by the kernels, without rounding."""
        return partial(NativeLinear, self._kernels, "exact")

    def is_sound(self, model: nn.Module) -> bool:
        """Test the linear layers on all shapes of the model; quantised ones on one shape, within their rounding."""
        if self._quantization:
            return is_sound(self._make, 192, 80, tolerance=0.1)
        return is_sound_for(model, self._make)

    def allocate(self, layers: Sequence[LayerShape], num_blocks: int) -> KVCache:
        """Allocate a cache in the attention kernel's layout."""
        return CpuCache(layers, num_blocks, self._kernels)

    def plan(self, cache: KVCache, chunks: Sequence[PackedChunk]) -> StepPlan:
        """Plan a step for the attention kernel, or for torch if the kernel serves no layer."""
        assert isinstance(cache, CpuCache), "a backend plans over caches that it allocated"
        return CpuPlan(self._kernels, cache, chunks) if any(cache.native) else TorchPlan(cache, chunks)

    def runner(
        self, model: nn.Module, cache: KVCache, vocab_size: int, size: StepSize, *, serves: bool = False, **trial: Any
    ) -> PackedRunner:
        """Compute steps of any size."""
        return PackedRunner(model, self, cache, vocab_size, **trial)

    def fuse(self, model: nn.Module, *, stored: torch.dtype, length: int, progress: Progress) -> None:
        """Replace linear layers, norms, activations, and decoder layers made of the usual parts."""
        pack_model(model, stored, self._make, progress)
        replace_pointwise(model, self._kernels)
        merge_shared_projections(model)
        fused = fuse_layers(model, self._kernels, length)
        progress(f"{fused} layers run as one kernel each ({self._kernels.target})")

    def release_memory(self) -> None:
        """Give freed memory back to the operating system."""
        give_back_memory()

    def describe(self) -> Mapping[str, str]:
        """Return the kind of linear layers and the processor."""
        return {"linear": self.linear, **hardware(torch.device("cpu"))}

"""The CPU backend: computes float32 models with kernels that are compiled for this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from engine.compute.backend import PackedChunk, Progress, StepPlan, StepSize
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.decoder_layer import fuse_layers
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.linear import NativeLinear, merge_shared_projections, take_over
from engine.compute.cpu.pointwise import replace_pointwise
from engine.compute.cpu.stored_linear import StoredLinear
from engine.compute.cpu.storing import packed_kind, store
from engine.compute.kv_cache import KVCache, LayerShape
from engine.compute.linear import Make, is_sound, is_sound_for, pack_model
from engine.compute.model_runner import PackedRunner
from engine.compute.torch_attention import TorchPlan
from engine.compute.torch_backend import hardware
from engine.host_memory import give_back_memory


class CpuBackend:
    """Computes with compiled kernels (see `engine.compute.backend.Backend`)."""

    QUANTIZATIONS: ClassVar[frozenset[str]] = frozenset({"int8", "int4"})
    """What an entry's `quantization` may say."""

    def __init__(self, kernels: Kernels, quantization: str | None = None) -> None:
        """quantization: `int8` or `int4`; `stored`: layers come in groups (`StoredLinear`), none is rounded."""
        self.linear = f"native {quantization}" if quantization else "native"
        self._kernels, self._quantization = kernels, quantization
        self._make = partial(self._pack, packed_kind(quantization, table=False))

    def _pack(self, kind: str, weight: torch.Tensor, bias: torch.Tensor | None) -> NativeLinear:
        """Pack `weight [out, in]` as one of `storing.KINDS`."""
        if kind in ("exact", "int8"):
            return NativeLinear(self._kernels, kind, weight, bias)
        packed = store(self._kernels, kind, lambda start, end: weight[start:end], *weight.shape)
        wide = None if bias is None else bias.detach().to(torch.float32).contiguous()
        return NativeLinear.of(self._kernels, dataclasses.replace(packed, bias=wide))

    @property
    def breaks_law(self) -> None:
        """None: each number of a result has a chain of operations of its own (kernels.c)."""

    @property
    def exact_linear(self) -> Make:
        """Make layers by the kernels, without rounding."""
        return partial(NativeLinear, self._kernels, "exact")

    def is_sound(self, model: nn.Module) -> bool:
        """Test the linear layers on all shapes of the model; quantised ones on one shape, within their rounding."""
        if self._quantization == "int8":
            return is_sound(self._make, 192, 80, tolerance=0.1)
        if self._quantization and not is_sound(partial(self._pack, "4 bits"), 192, 80, tolerance=0.2):
            return False
        if self._quantization == "int4":
            return is_sound(partial(self._pack, "8 bits"), 192, 80, tolerance=0.1)
        stored = {(m.in_features, min(m.out_features, 2048)) for m in model.modules() if isinstance(m, StoredLinear)}
        return is_sound_for(model, self._make) and all(is_sound(self._make, *shape) for shape in sorted(stored))

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
        take_over(model)
        head = model.get_output_embeddings()  # type: ignore[operator]
        if self._quantization == "int4" and type(head) is nn.Linear:
            model.set_output_embeddings(self._pack("8 bits", head.weight, head.bias))  # type: ignore[operator]
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

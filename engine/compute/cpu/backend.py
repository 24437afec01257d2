"""The CPU backend: computes float32 models with kernels that are compiled for this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from engine.compute.backend import PackedChunk, Progress, StepPlan, StepSize
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.decoder_layer import calls_of, fuse_layers
from engine.compute.cpu.layers.experts import replace_experts
from engine.compute.cpu.layers.own_weights import loaded_weights, pack_own_weights
from engine.compute.cpu.layers.pointwise import replace_pointwise
from engine.compute.cpu.layers.stack_runner import StackRunner
from engine.compute.cpu.linear import NativeLinear, merge_shared_projections, take_over
from engine.compute.cpu.packed_weight import Keep, make_each
from engine.compute.cpu.stored_linear import INPUTS, StoredLinear
from engine.compute.cpu.storing import packed_kind, store
from engine.compute.kv_cache import KVCache, LayerShape
from engine.compute.linear import Make, computes, is_sound, is_sound_for, pack_model
from engine.compute.model_runner import PackedRunner
from engine.compute.torch_attention import TorchPlan
from engine.compute.torch_backend import hardware
from engine.host_memory import give_back_memory
from engine.types.fingerprint_parts import digest_of

_ROUNDED: Final = 0.1
"""Allowed difference to torch's product where weights or inputs are rounded, as a fraction of its largest number."""


class CpuBackend:
    """Computes with compiled kernels (see `engine.compute.backend.Backend`)."""

    QUANTIZATIONS: ClassVar[frozenset[str]] = frozenset({"int8", "int4"})
    """What an entry's `quantization` may say."""

    def __init__(self, kernels: Kernels, quantization: str | None = None, keep: Keep = make_each) -> None:
        """quantization: `int8` or `int4`; `stored`: layers come in groups (`StoredLinear`), and none is rounded.

        keep: keeps weights that are packed here for the next start.
        """
        self.linear = "native, as stored" if quantization == "stored" else f"native {quantization or ''}".strip()
        self._kernels, self._quantization = kernels, quantization
        self._make = partial(self._pack, packed_kind(quantization, table=False))
        self._stored: Mapping[str, str] = {}
        self._keep = keep

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
        """Test the linear layers on all shapes of the model; quantised ones on one shape, within their rounding.

        Of layers that were loaded in groups, the smallest of each kind is tested.
        """
        if self._quantization == "int8":
            return is_sound(self._make, 192, 80, tolerance=_ROUNDED)
        if self._quantization == "int4":
            kinds = {"4 bits": 2 * _ROUNDED, "6 bits": _ROUNDED}
            return all(is_sound(partial(self._pack, kind), 192, 80, tolerance=t) for kind, t in kinds.items())
        stored = [module for module in model.modules() if isinstance(module, StoredLinear)]
        stored += [StoredLinear(self._kernels, weight.parts[0]) for weight in loaded_weights(model).values()]
        exact = {(m.in_features, min(m.out_features, 2048)) for m in stored if m.packed.input_kind == "float32"}
        smallest: dict[str, StoredLinear] = {}
        for layer in sorted(stored, key=lambda m: m.in_features * m.out_features):
            if layer.packed.input_kind != "float32":
                smallest.setdefault(layer.packed.layout, layer)
        return (
            is_sound_for(model, self._make)
            and all(is_sound(self._make, *shape) for shape in sorted(exact))
            and all(map(self._is_sound_stored, smallest.values()))
        )

    def _is_sound_stored(self, layer: StoredLinear) -> bool:
        native = NativeLinear.of(self._kernels, dataclasses.replace(layer.packed, bias=None))
        return computes(native, layer.weight, _ROUNDED)

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
        return StackRunner(model, self, cache, vocab_size, **trial)

    def fuse(self, model: nn.Module, *, stored: torch.dtype, length: int, progress: Progress) -> None:
        """Replace linear layers, experts, norms, activations, and decoder layers made of the usual parts."""
        own = {name: weight.parts[0].layout for name, weight in loaded_weights(model).items()}
        self._stored = take_over(model) | own
        head = model.get_output_embeddings()  # type: ignore[operator]
        if self._quantization == "int4" and type(head) is nn.Linear:
            packed = self._kept("head", partial(self._pack, "6 bits"), head.weight, head.bias)
            model.set_output_embeddings(packed)  # type: ignore[operator]
        pack_model(model, stored, self._kept_in_turn("layer", self._make), progress)
        replace_experts(model, self._kernels, self._kept_in_turn("expert", self._make), self.exact_linear, progress)
        with contextlib.suppress(Exception):  # the experts that are left: one by one, so that each weight is seen
            model.set_experts_implementation("eager")  # type: ignore[operator]
        parts, alone = self._kept_in_turn("own", self._make), self._kept_in_turn("alone", self.exact_linear)
        pack_own_weights(model, self._kernels, parts, alone)
        replace_pointwise(model, self._kernels)
        merge_shared_projections(model)
        fused = fuse_layers(model, self._kernels, length)
        unit = self._kernels.matrix_unit.describe(self._kernels.target)
        calls = calls_of(model)
        progress(f"{fused} layers run as kernels, in {calls} call{'' if calls == 1 else 's'} ({unit})")

    def _kept(
        self, name: str, make: Callable[[Tensor, Tensor | None], Any], weight: Tensor, bias: Tensor | None
    ) -> NativeLinear:
        """Make a layer of the weight that is kept under its name, or of this one."""
        packed = self._keep(name, lambda: make(weight, bias).packed)
        assert (packed.columns, packed.depth) == weight.shape, "a kept weight's key has all that decides its shape"
        return NativeLinear.of(self._kernels, packed)

    def _kept_in_turn(self, name: str, make: Make) -> Make:
        """Make layers whose weights are kept by their number: a model is walked through in the same order each time."""
        numbers = itertools.count()
        return lambda weight, bias: self._kept(f"{name} {next(numbers)}", make, weight, bias)

    def release_memory(self) -> None:
        """Give freed memory back to the operating system."""
        give_back_memory()

    def describe(self) -> Mapping[str, str]:
        """Return the kind of linear layers, which of them are computed as they were stored, and the processor."""
        stored = (
            {"stored_layers": str(digest_of(self._stored)), "inputs": INPUTS} if self._quantization == "stored" else {}
        )
        return {"linear": self.linear, **stored, **hardware(torch.device("cpu"))}

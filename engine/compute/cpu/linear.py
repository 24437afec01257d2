"""Linear layers by compiled kernels, and layers with the same input merged into one product. Knows no model by name.

Every number of a result has its own chain of operations (kernels.c), so the number of rows cannot matter. Weights that
bfloat16 holds without loss are read as such and widened in a register; `int8` rounds weights and inputs to bytes, in
groups of 128 numbers with a scale each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import PackedWeight, Product
from engine.compute.cpu.stored_linear import StoredLinear


class NativeLinear(nn.Module):
    """`x @ weight.T + bias` in float32 by our own kernels.

    Attributes:
        in_features, out_features: as in `nn.Linear`.
        kind: how the weight is stored (`engine.compute.cpu.packed_weight.KINDS`).
    """

    def __init__(self, kernels: Kernels, kind: str, weight: Tensor, bias: Tensor | None) -> None:
        """Pack `weight [out, in]`, of any float dtype; the original is not kept. kind: `exact` or `int8`."""
        super().__init__()
        self._take(kernels, kernels.pack(weight, bias, kind))

    @classmethod
    def of(cls, kernels: Kernels, packed: PackedWeight) -> NativeLinear:
        """Make a layer of a weight that is packed already."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(kernels, packed)
        return layer

    def _take(self, kernels: Kernels, packed: PackedWeight) -> None:
        self.out_features, self.in_features = packed.columns, packed.depth
        self.kernels, self.packed, self.kind = kernels, packed, packed.kind
        self._product: Product = kernels.group([packed])
        self.shared: tuple[SharedInput, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None:
            group, index = self.shared
            out = group.take(index, x)
        else:
            out = self._product(x.reshape(-1, self.in_features))[0]
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """A fresh float32 copy `[out, in]`, for the rare architecture that reads weights itself (Mamba)."""
        return self.kernels.widen(self.packed)

    @property
    def bias(self) -> Tensor | None:
        """`[out]` float32."""
        return self.packed.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, native {self.kind}"


def take_over(model: nn.Module) -> dict[str, str]:
    """Make native layers of those that were loaded packed, in place, without a copy. Returns their layouts, by name."""
    stored = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, StoredLinear)}
    for name, layer in stored.items():
        model.set_submodule(name, NativeLinear.of(layer.kernels, layer.packed))
    return {name: layer.packed.layout for name, layer in stored.items()}


class SharedInput:
    """Computes several layers that get the very same tensor (q, k and v; gate and up) as one product.

    The first that is called computes all; the others take what is ready if they are given that same tensor, and compute
    anew if not.
    """

    def __init__(self, layers: list[NativeLinear]) -> None:
        self._product = layers[0].kernels.group([layer.packed for layer in layers])
        self._in_features = layers[0].in_features
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def take(self, index: int, x: Tensor) -> Tensor:
        if self._input is not x or index not in self._ready:
            self._input = x
            self._ready = dict(enumerate(self._product(x.reshape(-1, self._in_features))))
        out = self._ready.pop(index)
        if not self._ready:
            self._input = None
        return out


@torch.inference_mode()
def merge_shared_projections(model: nn.Module) -> int:
    """Find layers with the same input and merge them into one product. Returns how many groups there are.

    Found by watching a pass over two tokens, and undone if a second pass then gives other bits (a model that changes an
    input in place between two layers would).
    """
    layers = [module for module in model.modules() if isinstance(module, NativeLinear)]
    seen: dict[int, list[NativeLinear]] = {}
    kept: list[Tensor] = []  # a freed tensor's id could come back

    def watch(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        kept.append(arguments[0])
        seen.setdefault(id(arguments[0]), []).append(layer)  # type: ignore[arg-type]

    tokens = torch.zeros(1, 2, dtype=torch.int64)
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        before = model(tokens, use_cache=False).logits
    except Exception:  # an architecture that is called in another way is not merged
        return 0
    finally:
        for hook in hooks:
            hook.remove()
    groups = 0
    for called in seen.values():
        for alike in _alike(called):
            shared = SharedInput(alike)
            groups += 1
            for index, layer in enumerate(alike):
                layer.shared = (shared, index)
    if not torch.equal(model(tokens, use_cache=False).logits, before):
        for layer in layers:
            layer.shared = None
        return 0
    return groups


def _alike(layers: list[NativeLinear]) -> Iterator[list[NativeLinear]]:
    """Group the layers that take one kind of input, two or more of them, if each was called once."""
    if len(set(map(id, layers))) < len(layers):
        return
    for kind in sorted({layer.packed.input_kind for layer in layers}):
        alike = [layer for layer in layers if layer.packed.input_kind == kind]
        if len(alike) > 1:
            yield alike

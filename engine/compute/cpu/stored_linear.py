"""Layers that are loaded as packed weights, until the backend fuses the model. Knows no checkpoint, no model by name.

A loader puts these in place of the model's own, so that a weight is never held in float32 as a whole. Plain
transformers computes with them, to compare with: each call widens the weight, a piece at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import PackedWeight

__all__ = ["INPUTS", "StoredEmbedding", "StoredLinear", "WeightChanged", "copied", "widen_layers"]

INPUTS = "int8 in groups of 32"
"""How the kernels round what they multiply a weight in groups with: a part of the fingerprint."""

_PIECE = 4096  # columns that are widened at once


class WeightChanged(Exception):
    """A model changes a weight of its own in place (RWKV divides some by powers of two): it has to be loaded whole."""


_IN_PLACE = frozenset(("__set__", "__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow"))))


class _Copy(Tensor):
    """A widened copy of a weight, or a view of one. Nobody would see a change of it, so none is allowed."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, changed = getattr(function, "__name__", ""), next(iter((*args, *(kwargs or {}).values())), None)
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if in_place and isinstance(changed, cls):  # not what only reads a copy, to change another tensor
            raise WeightChanged(f"{name} of a weight that is packed")
        if isinstance((kwargs or {}).get("out"), cls):
            raise WeightChanged(f"{name} into a weight that is packed")
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
            shares = isinstance(found, Tensor) and any(
                isinstance(of, cls) and of.untyped_storage().data_ptr() == found.untyped_storage().data_ptr()
                for of in args
            )
        return found.as_subclass(cls) if shares else found


def copied(weight: Tensor) -> Tensor:
    """Return a weight, of which a change in place raises `WeightChanged`."""
    copy: Tensor = weight.as_subclass(_Copy)
    return copy


class StoredLinear(nn.Module):
    """`x @ weight.T + bias` with a packed weight, widened at each call.

    Attributes:
        in_features, out_features: as in `nn.Linear`.
        packed: what the backend takes over.
    """

    def __init__(self, kernels: Kernels, packed: PackedWeight) -> None:
        super().__init__()
        self.kernels, self.packed = kernels, packed
        self.out_features, self.in_features = packed.columns, packed.depth

    @property
    def weight(self) -> Tensor:
        """A fresh float32 copy `[out, in]`.

        Raises:
            WeightChanged: when it is changed in place.
        """
        return copied(self.kernels.widen(self.packed))

    @property
    def bias(self) -> Tensor | None:
        """`[out]` float32."""
        return self.packed.bias

    def forward(self, x: Tensor) -> Tensor:
        bias, parts = self.bias, []
        for start in range(0, self.out_features, _PIECE):
            columns = torch.arange(start, min(start + _PIECE, self.out_features), dtype=torch.int64)
            own = None if bias is None else bias[start : start + _PIECE]
            parts.append(F.linear(x, self.kernels.widen(self.packed, columns), own))
        return torch.cat(parts, dim=-1)


class StoredEmbedding(nn.Module):
    """An embedding whose table is a packed weight, of which only the looked-up rows are widened.

    Attributes:
        scale: what a row is multiplied with (Gemma), in float32; None: nothing.
        num_embeddings, device: as of an `nn.Embedding` and its weight, which is not widened to ask for them.
    """

    device = torch.device("cpu")

    def __init__(self, kernels: Kernels, packed: PackedWeight, scale: Tensor | None = None) -> None:
        super().__init__()
        self.kernels, self.packed, self.scale = kernels, packed, scale
        self.num_embeddings, self.embedding_dim = packed.columns, packed.depth

    @property
    def weight(self) -> Tensor:
        """A fresh float32 copy `[rows, dim]`; changed in place, it raises `WeightChanged`."""
        copy: Tensor = self.kernels.widen(self.packed).as_subclass(_Copy)
        return copy

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.kernels.widen(self.packed, input_ids.flatten())
        if self.scale is not None:
            rows = rows * self.scale
        return rows.view(*input_ids.shape, -1)


def widen_layers(model: nn.Module) -> None:
    """Put plain linear layers in float32 in the places of stored ones: for a machine whose kernels compute wrongly."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, StoredLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.kernels.widen(layer.packed), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias, requires_grad=False)
            model.set_submodule(name, plain)

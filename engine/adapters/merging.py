"""Add an adapter to the weights of a plain model, as PEFT's `merge_and_unload` does in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.adapters.weights import Adapter
from engine.errors import LoadError

__all__ = ["merge"]


@torch.inference_mode()
def merge(model: nn.Module, adapter: Adapter, where: str) -> None:
    """Add `scale · B A` to each adapted weight, in place. Sums are in float32, and rounded once where a weight is not.

    Raises:
        LoadError: a weight is shared with another module, or a sum is not finite. `where`: begins the message.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, pair in adapter.pairs.items():
        layer: Any = model.get_submodule(name)
        weight = layer.weight
        if len(owners[id(weight)]) > 1:
            others = ", ".join(other for other in owners[id(weight)] if other != name)
            raise LoadError(f"{where}: {name} shares its weight with {others}: merged, the adapter would change both.")
        delta = pair.b.to(weight.device) @ pair.a.to(weight.device)
        if type(layer).__name__ == "Conv1D":
            delta = delta.T
        total = weight.data.to(torch.float32) + delta * pair.scale
        rounded = total.to(weight.dtype)
        if not bool(rounded.isfinite().all()):
            raise LoadError(f"{where}: merged into {name}, it gives numbers beyond those of {weight.dtype}.")
        weight.data.copy_(rounded)

"""Mixtures of experts by a compiled kernel: packed, the rows of each multiplied together. Knows no model by name.

transformers keeps the weights of a layer's experts in two tensors, `gate_up_proj` and `down_proj` (gpt-oss transposed,
with biases, gate and up in turns), and gathers, multiplies and sums in torch, in float32. Which experts a row gets, and
with which weights, the model's own router says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.compute.cpu.kernel_calls import ACTIVATIONS
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.experts_kernel import ExpertsKernel
from engine.compute.cpu.packed_weight import PackedWeight
from engine.compute.linear import Make, quasi_random
from engine.host_memory import give_back_memory

__all__ = ["NativeExperts", "replace_experts"]

_PLAIN = frozenset({"gate_up_proj", "down_proj"})
_BIASES = frozenset({"gate_up_proj_bias", "down_proj_bias"})
_EXACT, _ROUNDED = 1e-4, 1e-1  # allowed difference to the module replaced, as a share of its largest number


class NativeExperts(nn.Module):
    """Stands in a model for the module that held its experts' weights."""

    def __init__(self, kernel: ExpertsKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, hidden_states: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
        """Take rows, their experts and the weights of these, in this order; models name the last two differently."""
        chosen, weights = (*others, *named.values())
        return self.kernel(hidden_states, chosen, weights)


@torch.inference_mode()
def replace_experts(
    model: nn.Module, kernels: Kernels, make: Make, *, rounds: bool, progress: Callable[[str], None] | None = None
) -> int:
    """Replace experts in place, and free their original weights. Returns in how many layers.

    Args:
        make: packs a weight, as for a linear layer: its `packed` is taken.
        rounds: whether that rounds the weights.
    """
    targets = [(p, name) for p in model.modules() for name, child in p.named_children() if _weights(child) is not None]
    count = 0
    for parent, name in targets:
        experts = _native(getattr(parent, name), kernels, make, _ROUNDED if rounds else _EXACT)
        if experts is not None:
            setattr(parent, name, experts)
            count += 1
            give_back_memory()
            if progress:
                progress(f"packing experts {count}/{len(targets)}")
    return count


def _weights(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the weights of experts, `[experts, 2 · inner, dim]` and `[experts, dim, inner]`; None if it has others."""
    found = {name: parameter for name, parameter in module.named_parameters() if "." not in name}
    if not _PLAIN <= set(found) <= _PLAIN | _BIASES or len(found) == 3:
        return None
    gate_up: Tensor = found["gate_up_proj"]
    down: Tensor = found["down_proj"]
    if len(found) == 4:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    fits = gate_up.dim() == down.dim() == 3 and gate_up.dtype == down.dtype == torch.float32
    if not fits or gate_up.device.type != "cpu" or gate_up.shape != (len(down), 2 * down.shape[2], down.shape[1]):
        return None
    return gate_up, down


def _native(module: nn.Module, kernels: Kernels, make: Make, tolerance: float) -> NativeExperts | None:
    """Pack a module's experts; None if they then give other numbers, with every activation that there is."""
    weights = _weights(module)
    assert weights is not None
    x, chosen, shares = _trial(*weights)
    try:
        right = module(x, chosen, shares)
    except Exception:  # called in another way
        return None
    if not isinstance(right, Tensor) or right.shape != x.shape:
        return None
    biases = [getattr(module, f"{name}_bias", None) for name in ("gate_up_proj", "down_proj")]
    inner = weights[1].shape[2]
    turns = torch.arange(2 * inner, dtype=torch.int64).view(inner, 2).T.reshape(-1) if None not in biases else None
    gate_up, down = _packed(weights[0], biases[0], turns, make), _packed(weights[1], biases[1], None, make)
    for activation in ACTIVATIONS:
        experts = NativeExperts(kernels.experts(gate_up, down, activation))
        if (experts(x, chosen, shares) - right).abs().max() <= tolerance * right.abs().max():
            return experts
    return None


def _packed(weights: Tensor, biases: Tensor | None, order: Tensor | None, make: Make) -> list[PackedWeight]:
    """Pack the weights of experts. order: in which their columns are taken; None: as they stand."""
    packed = []
    for expert, weight in enumerate(weights):
        bias = None if biases is None else biases[expert]
        if order is not None:
            weight, bias = weight[order], None if bias is None else bias[order]
        layer: Any = make(weight.contiguous(), bias)
        packed.append(layer.packed)
    return packed


def _trial(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for which all experts are chosen that there are, up to 32; their numbers are as large as a normed row's."""
    rows, experts = 8, len(down)
    choices = min(experts, 4)
    x = quasi_random(rows, gate_up.shape[2]) * 3
    chosen = torch.arange(rows * choices, dtype=torch.int64).view(rows, choices) * max(experts // (rows * choices), 1)
    return x, chosen % experts, quasi_random(rows, choices) + 1

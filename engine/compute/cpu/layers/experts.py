"""Mixtures of experts by a compiled kernel: packed, the rows of each multiplied together. Knows no model by name.

transformers keeps the weights of a layer's experts in two tensors, `gate_up_proj` and `down_proj`, as they are or
transposed, with biases or without, gate before up or in turns. Which of these it is, and which activation, is found by
trying. Which experts a row gets, and with which weights, the model's own router says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.compute.cpu.kernel_calls import ACTIVATIONS
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.experts_kernel import ExpertsKernel
from engine.compute.cpu.layers.own_weight import OwnWeight
from engine.compute.cpu.packed_weight import PackedWeight
from engine.compute.linear import Make, quasi_random
from engine.errors import out_of_memory
from engine.host_memory import give_back_memory

__all__ = ["NativeExperts", "replace_experts"]

_WEIGHTS: Final = {"gate_up_proj", "down_proj"}
_BIASES: Final = {"gate_up_proj_bias", "down_proj_bias"}
_TRIED: Final = 4
"""Experts that are tried."""
_SCALES: Final = (0.01, 1.0, 2.0, 3.0, 30.0, 1e3, 1e6)
"""How large the rows are that are tried: a normed row's numbers are near 1; far beyond, an activation may be cut."""
_TOLERANCE: Final = 3e-5
"""Allowed difference to the module replaced, as a share of a row's largest number: erf's GELU differs by more."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a module stores its experts, perhaps: `[experts, 2 · inner, dim]`, `[experts, dim, inner]`, and biases.

    Attributes:
        turns: whether columns of gate and up take turns; else those of gate come first.
    """

    gate_up: Tensor  # an `OwnWeight`, if it was packed when it was loaded
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    turns: bool

    def packed(self, experts: Sequence[int], make: Make) -> tuple[list[PackedWeight], list[PackedWeight]]:
        """Pack some experts."""
        inner = self.down.shape[2]
        order = torch.arange(2 * inner, dtype=torch.int64).view(inner, 2).T.reshape(-1) if self.turns else None
        return (
            [_pack(self.gate_up, self.gate_up_bias, i, order, make) for i in experts],
            [_pack(self.down, self.down_bias, i, None, make) for i in experts],
        )

    def whole(self, make: Make) -> tuple[Sequence[PackedWeight], Sequence[PackedWeight]]:
        """Pack all experts, or return them as they were packed when they were loaded."""
        if isinstance(self.gate_up, OwnWeight) and isinstance(self.down, OwnWeight) and not self.turns:
            return self.gate_up.parts, self.down.parts
        return self.packed(range(len(self.down)), make)


def _pack(weights: Tensor, biases: Tensor | None, expert: int, order: Tensor | None, make: Make) -> PackedWeight:
    weight = weights[expert]
    bias = None if biases is None else biases[expert]
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    layer: Any = make(weight.contiguous(), bias)
    packed: PackedWeight = layer.packed
    return packed


class NativeExperts(nn.Module):
    """Stands in a model for the module that held its experts' weights."""

    def __init__(self, kernel: ExpertsKernel, *, blocks: int = 0) -> None:
        """blocks: how many experts there are if rows are given for each, expert by expert; 0: with choices."""
        super().__init__()
        self.kernel, self.blocks = kernel, blocks

    def forward(self, hidden_states: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
        """Take rows, their experts and the weights of these, in this order; models name the last two differently."""
        if self.blocks:
            return self._of_blocks(hidden_states)
        chosen, weights = (*others, *named.values())
        return self.kernel(hidden_states, chosen, weights)

    def _of_blocks(self, x: Tensor) -> Tensor:
        """Compute Llama 4's way: a row is there for every expert, and is zeros where that is not chosen."""
        rows = torch.arange(self.blocks, dtype=torch.int64).repeat_interleave(x.shape[0] // self.blocks)
        chosen = torch.where((x != 0).any(-1), rows, -1)[:, None]
        return self.kernel(x, chosen, torch.ones(chosen.shape, dtype=torch.float32))


@torch.inference_mode()
def replace_experts(
    model: nn.Module, kernels: Kernels, make: Make, exact: Make, progress: Callable[[str], None] | None = None
) -> int:
    """Replace experts in place, and free their original weights. Returns in how many layers.

    Args:
        make: packs a weight, as for a linear layer: its `packed` is taken; exact: the same without rounding.
    """
    targets = [(p, name) for p in model.modules() for name, child in p.named_children() if any(_readings(child))]
    count = 0
    for parent, name in targets:
        experts = _native(getattr(parent, name), kernels, make, exact)
        if experts is not None:
            setattr(parent, name, experts)
            count += 1
            give_back_memory()
            if progress:
                progress(f"packing experts {count}/{len(targets)}")
    return count


def _readings(module: nn.Module) -> Iterator[_Stored]:
    """Return all that the weights of a module can be, by their shapes."""
    found: dict[str, Any] = {name: value for name, value in vars(module).items() if isinstance(value, OwnWeight)}
    found |= module.named_parameters(recurse=False)
    if set(found) not in (_WEIGHTS, _WEIGHTS | _BIASES):
        return
    if any(weight.dtype != torch.float32 or weight.device.type != "cpu" for weight in found.values()):
        return
    biases: tuple[Tensor | None, Tensor | None] = found.get("gate_up_proj_bias"), found.get("down_proj_bias")
    packed = any(isinstance(weight, OwnWeight) for weight in found.values())  # never those that are transposed
    for transposed, turns in itertools.product((False,) if packed else (False, True), (False, True)):
        gate_up, down = found["gate_up_proj"], found["down_proj"]
        if gate_up.dim() != 3 or down.dim() != 3:
            return
        if transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        experts, dim, inner = down.shape
        shapes = [None if bias is None else bias.shape for bias in biases]
        if gate_up.shape == (experts, 2 * inner, dim) and shapes in (
            [None, None],
            [(experts, 2 * inner), (experts, dim)],
        ):
            yield _Stored(gate_up, down, *biases, turns)


def _native(module: nn.Module, kernels: Kernels, make: Make, exact: Make) -> NativeExperts | None:
    """Pack a module's experts; None if no reading and no activation gives its numbers."""
    stored = next(_readings(module))
    count, dim, _ = stored.down.shape
    tried = sorted({i * (count - 1) // max(_TRIED - 1, 1) for i in range(_TRIED)})
    x = torch.cat([quasi_random(2, dim) * 3 * scale for scale in _SCALES])
    chosen = torch.arange(x.shape[0] * len(tried), dtype=torch.int64).view(-1, len(tried)) % len(tried)
    shares = quasi_random(*chosen.shape) + 1
    routed = _result(module, x, torch.tensor(tried, dtype=torch.int64)[chosen], shares)
    if routed is None and (routed := _in_blocks(module, x, chosen, shares, tried, count)) is not None:
        blocks = count
    else:
        blocks = 0
    if routed is None:
        return None
    for stored in _readings(module):
        few = stored.packed(tried, exact)
        for activation in ACTIVATIONS:
            mine = kernels.experts(*few, activation)(x, chosen, shares)
            if ((mine - routed).abs().amax(-1) <= _TOLERANCE * routed.abs().amax(-1)).all():
                return NativeExperts(kernels.experts(*stored.whole(make), activation), blocks=blocks)
    return None


def _in_blocks(
    module: nn.Module, x: Tensor, chosen: Tensor, shares: Tensor, tried: Sequence[int], count: int
) -> Tensor | None:
    """Compute the sums with a module that takes rows for every expert, one after the other, and nothing else."""
    blocks = torch.zeros(count, *x.shape, dtype=torch.float32)
    blocks[torch.tensor(tried, dtype=torch.int64)] = x
    given = _result(module, blocks.flatten(0, 1))
    if given is None:
        return None
    given = given.view(count, *x.shape)
    if given[[i for i in range(count) if i not in tried]].any():  # of zeros come no zeros: they cannot be left out
        return None
    of_each = given[torch.tensor(tried, dtype=torch.int64)][chosen.T, torch.arange(x.shape[0], dtype=torch.int64)]
    return (of_each * shares.T[..., None]).sum(0)


def _result(module: nn.Module, x: Tensor, *others: Tensor) -> Tensor | None:
    """Call a module; None if it is called in another way."""
    try:
        out = module(x, *others)
    except Exception as error:
        if out_of_memory(error):
            raise
        return None
    return out if isinstance(out, Tensor) and out.shape == x.shape and bool(out.isfinite().all()) else None

"""Replace norms and activations by single-pass kernels, in place. Recognises modules by their results, not their names.

transformers computes them in four to six tensor operations, each of which costs more than its arithmetic on one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compute.cpu.kernels import Kernels
from engine.compute.linear import quasi_random

_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class NativeNorm(nn.Module):
    """Normalisation over the last dimension, in one pass: RMS, or LayerNorm without a bias if `centred`."""

    def __init__(self, kernels: Kernels, weight: Tensor, epsilon: float, *, centred: bool = False) -> None:
        super().__init__()
        self.kernels, self.variance_epsilon, self.centred = kernels, epsilon, centred
        self.weight = nn.Parameter(weight.detach().to(torch.float32).contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.norm(x, self.weight, self.variance_epsilon, centred=self.centred)


class NativeActivation(nn.Module):
    """One of the activations that there are kernels for (`Kernels.activate`)."""

    def __init__(self, kernels: Kernels, kind: str) -> None:
        super().__init__()
        self.kernels, self.kind = kernels, kind

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.activate(x, self.kind)


@torch.inference_mode()
def replace_pointwise(model: nn.Module, kernels: Kernels) -> int:
    """Replace the modules that are norms or activations for which there is a kernel. Returns how many."""
    targets = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    count = 0
    for parent, name, child in targets:
        replacement = _as_norm(child, kernels) or as_activation(child, kernels)
        if replacement is not None:
            setattr(parent, name, replacement)
            count += 1
    return count


def _takes_one(module: nn.Module) -> bool:
    """Tell whether a module takes one tensor and nothing else: a gated norm without its gate looks like a plain one."""
    return len(inspect.signature(module.forward).parameters) == 1


def _as_norm(module: nn.Module, kernels: Kernels) -> NativeNorm | None:
    weight = dict(module.named_parameters()).get("weight")
    if len(list(module.parameters())) != 1 or len(list(module.modules())) != 1 or weight is None or weight.dim() != 1:
        return None
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if (
        not _takes_one(module)
        or not isinstance(epsilon, float)
        or weight.dtype != torch.float32
        or weight.device.type != "cpu"
    ):
        return None
    # Small numbers, too: there the epsilon decides.
    x = quasi_random(3, weight.shape[0]) * torch.tensor([[1.0], [1e-3], [1e3]], dtype=torch.float32)
    try:
        right = module(x)
    except Exception:  # called in another way: not a norm
        return None
    for candidate in (weight, 1 + weight):  # Gemma keeps the difference to one
        for centred in (False, True):
            norm = NativeNorm(kernels, candidate, epsilon, centred=centred)
            if _agree(right, norm(x)):
                return norm
    return None


def as_activation(module: nn.Module, kernels: Kernels) -> NativeActivation | None:
    """Return the kernel that computes what a module does; None if there is none."""
    if next(module.parameters(), None) is not None or len(list(module.modules())) > 1:
        return None
    if isinstance(module, NativeActivation) or not _takes_one(module):
        return None
    x = quasi_random(4, 64) * torch.tensor([[1.0], [1e-3], [30.0], [1e4]], dtype=torch.float32)
    try:
        right = module(x)
    except Exception:  # called in another way: not an activation
        return None
    for kind, function in _ACTIVATIONS.items():
        if _agree(right, function(x)):
            found = NativeActivation(kernels, kind)
            return found if _agree(right, found(x)) else None
    return None


def _agree(right: object, found: Tensor) -> bool:
    """Tell whether a module's result is what we compute, up to rounding."""
    return (
        isinstance(right, Tensor)
        and right.dtype == found.dtype
        and right.shape == found.shape
        and torch.allclose(right, found, rtol=1e-5, atol=1e-6)
    )

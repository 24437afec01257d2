"""Pack the weights that a model's modules multiply with by themselves, in place. Knows no model by name.

torch's product of a few rows can have other bits than the same rows among more, so which expert a router chooses could
depend on neighbours. A pass is watched; a weight that was only ever an `F.linear`'s, or of which single parts were
(`self.up_proj[expert]`), becomes an `OwnWeight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.own_weight import OwnWeight, describes, is_number, is_same, operands
from engine.compute.linear import Make
from engine.errors import out_of_memory
from engine.host_memory import give_back_memory

__all__ = ["loaded_weights", "pack_own_weights", "widen_own_weights"]


class _Watch(TorchFunctionMode):
    """Notes what is done with some weights.

    Attributes:
        linear: ids of weights that were multiplied by `F.linear`; others: of those with which something else was done.
    """

    def __init__(self, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._weights = weights
        self._parts: dict[int, tuple[int, Tensor]] = {}  # a freed tensor's id could come back, so each is kept
        self.linear: set[int] = set()
        self.others: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for given in (*args, *kwargs.values()):
            base = id(given) if id(given) in self._weights else self._parts.get(id(given), (0,))[0]
            if base:
                self._note(func, args, kwargs, given, base, out)
        return out

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Any, base: int, out: Any
    ) -> None:
        whole = given is self._weights[base]
        if func is F.linear and given is operands(args, kwargs)[1] and (not whole or given.dim() == 2):
            self.linear.add(base)
        elif func is Tensor.__getitem__ and whole and given.dim() == 3 and is_number(args[1]):
            self._parts[id(out)] = base, out
        elif not describes(func) and not (is_same(getattr(func, "__name__", ""), args[1:], kwargs) and out is args[0]):
            self.others.add(base)


@torch.inference_mode()
def pack_own_weights(model: nn.Module, kernels: Kernels, make: Make, exact: Make) -> int:
    """Pack the weights that a model's modules multiply with by themselves, in place. Returns how many.

    Found by watching a pass over two tokens. The originals are freed. Those that were packed when they were loaded are
    multiplied by the kernels from now on.

    Args:
        make: packs one of several weights (experts): its `packed` is taken; exact: packs a weight that stands alone.
    """
    for weight in loaded_weights(model).values():
        weight.plain = False
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    weights: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() in (2, 3) and parameter.dtype == torch.float32:
                owners.setdefault(id(parameter), []).append((module, name))
                weights[id(parameter)] = parameter
    try:
        with _Watch(weights) as watch:
            model(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except Exception as error:  # an architecture that is called in another way
        if out_of_memory(error):
            raise
        return 0
    found = [key for key in weights if key in watch.linear - watch.others]
    del watch
    for key in found:
        _replace(weights.pop(key), owners.pop(key), kernels, make, exact)
        give_back_memory()
    return len(found)


def _replace(weight: Tensor, owners: list[tuple[nn.Module, str]], kernels: Kernels, make: Make, exact: Make) -> None:
    kind, parts = (exact, [weight]) if weight.dim() == 2 else (make, list(weight))
    layers: list[Any] = [kind(part.contiguous(), None) for part in parts]
    own = OwnWeight.of(kernels, [layer.packed for layer in layers], weight.shape)
    for module, name in owners:
        own.install(module, name)


def widen_own_weights(model: nn.Module) -> None:
    """Make float32 parameters of them again: for a machine whose kernels compute wrongly."""
    for place, weight in loaded_weights(model).items():
        module, _, name = place.rpartition(".")
        owner = model.get_submodule(module)
        delattr(owner, name)
        setattr(owner, name, nn.Parameter(weight.widened(), requires_grad=False))


def loaded_weights(model: nn.Module) -> dict[str, OwnWeight]:
    """Return the weights that were packed when they were loaded and are `plain` still, by name."""
    return {
        f"{place}.{name}".lstrip("."): value
        for place, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, OwnWeight) and value.plain
    }

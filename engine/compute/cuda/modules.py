"""Replace a model's linear layers, norms and gated feed-forward parts by operations that treat every row by itself.

Modules are recognised by their results, not their names. What is not recognised stays as it is: torch's element-wise
operations treat every row by itself anyway, and the self-test looks at the whole. Weights of layers that get the same
input are joined along `out`, which changes no number; the replaced modules keep views of them, so that a model can be
given back its own modules without a copy.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.compute.backend import Progress
from engine.compute.cuda import weights
from engine.compute.cuda.operations import LinearWeight, NormKind, Operations
from engine.compute.discovery import input_device
from engine.compute.linear import quasi_random
from engine.errors import out_of_memory

__all__ = ["Replaced", "RowGatedMLP", "RowLinear", "RowNorm", "replace_modules"]


class RowLinear(nn.Module):
    """`x @ weight.T + bias`, each row by itself.

    Attributes:
        in_features, out_features: as in `nn.Linear`.
    """

    def __init__(self, operations: Operations, packed: LinearWeight, out_dtype: torch.dtype | None) -> None:
        """out_dtype: of the result; None: that of the input."""
        super().__init__()
        self.operations, self.packed, self.out_dtype = operations, packed, out_dtype
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.shared: tuple[_SharedInput, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None:
            shared, index = self.shared
            return shared.take(index, x)
        out = self.operations.linear(x.reshape(-1, self.in_features), self.packed, self.out_dtype or x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, for the rare architecture that reads weights itself, or a dtype from them."""
        return self.packed.data if self.packed.kind == "exact" else weights.widened(self.packed)

    @property
    def bias(self) -> Tensor | None:
        """`[out]`."""
        return self.packed.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed.kind}"


class _SharedInput:
    """Computes several layers that get the very same tensor as one product; the first that is called computes all."""

    def __init__(self, layers: list[RowLinear]) -> None:
        self._operations = layers[0].operations
        self.packed = weights.concatenated([layer.packed for layer in layers])
        self._sizes = [layer.out_features for layer in layers]
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def take(self, index: int, x: Tensor) -> Tensor:
        if self._input is not x or index not in self._ready:
            out = self._operations.linear(x.reshape(-1, x.shape[-1]), self.packed, x.dtype)
            parts = torch.split(out.view(*x.shape[:-1], -1), self._sizes, -1)
            self._input, self._ready = x, dict(enumerate(parts))
        found = self._ready.pop(index)
        if not self._ready:
            self._input = None
        return found


class RowNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, operations: Operations, weight: Tensor, epsilon: float, kind: NormKind) -> None:
        super().__init__()
        self.operations, self.variance_epsilon, self.kind = operations, epsilon, kind
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return self.operations.rms_norm(rows, self.weight, self.variance_epsilon, self.kind).view(x.shape)


class RowGatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, with gate and up as one product."""

    def __init__(self, operations: Operations, gate_up: LinearWeight, down: RowLinear) -> None:
        super().__init__()
        self.operations, self.gate_up, self.down = operations, gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = self.operations.silu_mul(self.operations.linear(rows, self.gate_up, x.dtype))
        out: Tensor = self.down(inner)
        return out.view(x.shape)


class Replaced:
    """The modules that were replaced in a model, so that it can have its own back.

    Attributes:
        counts: how many of each kind were replaced.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        self._own: dict[RowLinear, Any] = {}

    def put(self, parent: nn.Module, name: str, new: nn.Module, kind: str) -> None:
        """Put a module in the place of another, which is kept."""
        old = getattr(parent, name)
        self._places.append((parent, name, old))
        if isinstance(new, RowLinear):
            self._own[new] = old
            _point(old, new.packed)
        setattr(parent, name, new)
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def share(self, layers: list[RowLinear]) -> None:
        """Compute layers with the same input as one product. Their own weights become views of the joined one."""
        shared = _SharedInput(layers)
        start = 0
        for index, layer in enumerate(layers):
            end = start + layer.out_features
            layer.packed = weights.part(shared.packed, start, end)
            layer.shared = (shared, index)
            _point(self._own[layer], layer.packed)
            start = end

    def undo(self) -> None:
        """Give the model its own modules back."""
        for parent, name, old in reversed(self._places):
            setattr(parent, name, old)
        self._places.clear()
        self._own.clear()
        self.counts.clear()


@torch.inference_mode()
def replace_modules(model: nn.Module, operations: Operations, say: Progress) -> Replaced:
    """Replace what is recognised, in place."""
    replaced = Replaced()
    try:
        _replace(model, operations, replaced, say)
    except BaseException:  # a kernel that does not compile, say: the model is somebody else's then
        replaced.undo()
        raise
    return replaced


def _replace(model: nn.Module, operations: Operations, replaced: Replaced, say: Progress) -> None:
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    for parent, name, child in list(_children(model)):
        if (norm := _as_norm(child, operations)) is not None:
            replaced.put(parent, name, norm, "norms")
    _replace_linears(model, operations, replaced, say)
    _share_inputs(model, replaced)
    for parent, name, child in list(_children(model)):
        if (gated := _as_gated(child, operations, dtype)) is not None:
            replaced.put(parent, name, gated, "gated")


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        yield from ((parent, name, child) for name, child in parent.named_children())


def _replace_linears(model: nn.Module, operations: Operations, replaced: Replaced, say: Progress) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]
    targets = [place for place in _children(model) if _is_linear(place[2])]
    for number, (parent, name, child) in enumerate(targets, 1):
        # Logits leave in float32: between 16 and 32 the step of bfloat16 is an eighth.
        new = RowLinear(operations, _packed_of(child), torch.float32 if child is head else None)
        replaced.put(parent, name, new, "linears")
        if number % _TELL_EVERY == 0 or number == len(targets):
            say(f"preparing layers {number}/{len(targets)}")


_TELL_EVERY: Final = 32


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _is_conv1d(module) or _is_packed(module)


def _is_packed(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer whose weight is in the kernel's form already: rounded, or read so."""
    return not isinstance(module, RowLinear) and isinstance(getattr(module, "packed", None), LinearWeight)


def _packed_of(linear: Any) -> LinearWeight:
    if _is_packed(linear):
        packed: LinearWeight = linear.packed
        return packed
    weight = linear.weight.detach()
    return weights.exact(weight.T.contiguous() if _is_conv1d(linear) else weight, linear.bias)


def _point(own: Any, packed: LinearWeight) -> None:
    """Let a model's own layer read the weight that the kernel reads, so that no number is held twice."""
    if _is_packed(own):
        own.packed = packed
    else:
        data = packed.data.T if _is_conv1d(own) else packed.data
        own.weight = nn.Parameter(data, requires_grad=False)


def _is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' `Conv1D`, a linear layer whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D"


def _share_inputs(model: nn.Module, replaced: Replaced) -> None:
    """Find layers that get the same tensor, by watching a pass over two tokens, and join them.

    A model that changes an input in place between two layers would give other numbers then; the self-test finds it.
    """
    layers = [module for module in model.modules() if isinstance(module, RowLinear)]
    seen: dict[int, list[RowLinear]] = {}
    kept: list[Tensor] = []  # a freed tensor's id could come back

    def watch(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, RowLinear)
        kept.append(arguments[0])
        seen.setdefault(id(arguments[0]), []).append(layer)

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        model(torch.zeros(1, 2, dtype=torch.int64, device=input_device(model)), use_cache=False)
    except Exception as error:  # an architecture that is called in another way is not joined
        if out_of_memory(error):
            raise
        return
    finally:
        for hook in hooks:
            hook.remove()
    called = Counter(layer for group in seen.values() for layer in group)
    for group in seen.values():
        alone = any(called[layer] > 1 or layer.out_dtype is not None for layer in group)
        if len(group) > 1 and not alone and weights.mergeable([layer.packed for layer in group]):
            replaced.share(group)


_CLOSE: Final = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Allowed relative difference between a module and what replaces it: two roundings."""


def _as_norm(module: nn.Module, operations: Operations) -> RowNorm | None:
    weight = dict(module.named_parameters()).get("weight")
    if len(list(module.parameters())) != 1 or len(list(module.modules())) != 1 or weight is None or weight.dim() != 1:
        return None
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(epsilon, float) or not _takes_one(module) or weight.dtype not in _CLOSE:
        return None
    # Small numbers, too: there the epsilon decides.
    x = quasi_random(3, weight.shape[0]) * torch.tensor([[1.0], [1e-3], [1e3]], dtype=torch.float32)
    x = x.to(weight.device, weight.dtype)
    kinds: tuple[NormKind, ...] = ("weight", "one plus weight")
    norms = (RowNorm(operations, weight, epsilon, kind) for kind in kinds)
    return next((norm for norm in norms if _agree(module, norm, x)), None)


def _as_gated(module: nn.Module, operations: Operations, dtype: torch.dtype) -> RowGatedMLP | None:
    """Recognise a gated feed-forward part: two or three linear layers, an activation, and nothing else."""
    linears = [child for child in module.children() if isinstance(child, RowLinear)]
    others = [child for child in module.children() if not isinstance(child, RowLinear)]
    if not (2 <= len(linears) <= 3) or len(others) > 1 or not _takes_one(module):
        return None
    *first, down = linears
    gate_up = first[0].packed
    if len(first) == 2:
        shared = first[0].shared
        if shared is None or first[1].shared is None or first[1].shared[0] is not shared[0]:
            return None
        gate_up = shared[0].packed
    if gate_up.out_features != 2 * down.in_features or gate_up.in_features != down.out_features:
        return None
    gated = RowGatedMLP(operations, gate_up, down)
    x = quasi_random(3, gate_up.in_features).to(gate_up.data.device, dtype)
    return gated if _agree(module, gated, x) else None


def _takes_one(module: nn.Module) -> bool:
    """Tell whether a module takes one tensor and nothing else: a gated norm without its gate looks like a plain one."""
    return len(inspect.signature(module.forward).parameters) == 1


def _agree(module: nn.Module, ours: nn.Module, x: Tensor) -> bool:
    """Tell whether two modules give the same numbers, up to two roundings, in the same dtype and shape."""
    try:
        theirs = module(x)
    except Exception as error:  # called in another way
        if out_of_memory(error):
            raise
        return False
    mine = ours(x)
    if not isinstance(theirs, Tensor) or (theirs.dtype, theirs.shape) != (mine.dtype, mine.shape):
        return False
    bound = _CLOSE[x.dtype]
    scale = theirs.float().abs().amax(-1, keepdim=True)
    return bool(((mine.float() - theirs.float()).abs() <= bound * scale).all())

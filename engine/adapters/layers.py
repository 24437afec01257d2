"""Compute adapters beside the layers of a model, for the rows that ask for one.

A layer computes all rows of a step as ever; to an adapter's rows it then adds `scale · B (A x)`. Both products are
computed by layers whose rows are independent, one adapter after the other, so the bits of a row depend on the model and
on its own adapter alone. Which row has which adapter comes with the step's plan (`StepPlan.adapter_rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from engine.adapters.weights import Adapter, LoraPair
from engine.compute.attention import current_plan
from engine.compute.linear import Make, is_sound
from engine.errors import LoadError

__all__ = ["AdaptedLinear", "Places", "attach", "computed_plainly", "places_of"]

Places = Mapping[str, tuple[nn.Module, str]]
"""By the name of a layer's module: the module that holds it, and the name under which."""


class _Product(nn.Module):
    """`scale · B (A x)` of one adapter, by layers whose rows are independent."""

    def __init__(self, pair: LoraPair, make: Make) -> None:
        super().__init__()
        self.down, self.up, self.scale = make(pair.a, None), make(pair.b, None), pair.scale

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(rows))
        return out * self.scale


class AdaptedLinear(nn.Module):
    """A linear layer, and what adapters add to it.

    Attributes:
        inner: the layer as it was.
    """

    def __init__(self, inner: nn.Module, pairs: Mapping[str, LoraPair], make: Make) -> None:
        """pairs: by the adapter's name; make: makes layers whose rows are independent."""
        super().__init__()
        self.inner = inner
        self._products = {name: _Product(pair, make) for name, pair in pairs.items()}  # by name, which may have dots

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        plan = current_plan()
        if plan is None or not plan.adapter_rows:
            return out
        rows, sums = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        for name, numbers in plan.adapter_rows.items():
            product = self._products.get(name)
            if product is not None:
                # Two roundings, of the product and of the sum, wherever a row stands: no fused instruction.
                sums.index_add_(0, numbers, product(rows.index_select(0, numbers)))
        return sums.view(out.shape)

    def __getattr__(self, name: str) -> Any:
        """Read missing attributes from the layer: models ask for its weight's dtype, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def places_of(model: nn.Module, adapters: Sequence[Adapter], where: str) -> Places:
    """Find the layers that adapters are computed beside, before any is replaced.

    Raises:
        LoadError: one makes the logits, for which only some rows are computed. `where`: begins the message.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    places = {}
    for adapter in adapters:
        for name in adapter.pairs:
            if model.get_submodule(name) is head:
                raise LoadError(
                    f"{where}: adapters.{adapter.name}: {name} makes the logits, and no adapter is computed beside it: "
                    "give the adapter merge: true."
                )
            parent, _, own = name.rpartition(".")
            places[name] = (model.get_submodule(parent), own)
    return places


def attach(places: Places, adapters: Sequence[Adapter], make: Make, where: str) -> None:
    """Put the adapters beside their layers, in place, once a backend has replaced those.

    Raises:
        LoadError: products of an adapter's shapes do not have independent rows here. `where`: begins the message.
    """
    for shape in sorted({tuple(m.shape) for a in adapters for pair in a.pairs.values() for m in (pair.a, pair.b)}):
        if not is_sound(make, shape[1], min(shape[0], 2048)):
            raise LoadError(f"{where}: adapters: products with a matrix {list(shape)} are not reproducible here.")
    for name, (parent, own) in places.items():
        pairs = {adapter.name: adapter.pairs[name] for adapter in adapters if name in adapter.pairs}
        setattr(parent, own, AdaptedLinear(getattr(parent, own), pairs, make))


@contextmanager
def computed_plainly(model: nn.Module, adapter: Adapter, where: str) -> Iterator[None]:
    """Compute an adapter in all rows of a plain model's passes, by torch, to compare with.

    Raises:
        LoadError: a layer is not called once for all tokens of a pass (experts are), so that its rows cannot be told
            apart. `where`: begins the message.
    """
    tokens: list[int] = []
    rows: dict[str, list[int]] = {name: [] for name in adapter.pairs}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens.append((args[0] if args else kwargs["input_ids"]).numel())

    def add(name: str, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x, pair = args[0], adapter.pairs[name]
        rows[name].append(x.numel() // x.shape[-1])
        return out + F.linear(F.linear(x, pair.a), pair.b) * pair.scale

    hooks = [model.register_forward_pre_hook(note, with_kwargs=True)]
    for name in adapter.pairs:
        layer = model.get_submodule(name)
        hooks.append(layer.register_forward_hook(lambda _, args, out, name=name: add(name, args, out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for name, seen in rows.items():
        if seen != tokens:
            raise LoadError(
                f"{where}: adapters.{adapter.name}: {name} is not computed once for every token: give the adapter "
                "merge: true."
            )

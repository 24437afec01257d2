"""A layer that holds a packed weight gives copies of it, of which nobody would see a change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.reordered import ReorderedLinear
from engine.compute.cpu.stored_linear import StoredLinear, WeightChanged, widen_layers


def _set(weight: Tensor) -> None:
    weight[0] = 0


def _add(weight: Tensor) -> None:
    weight += 1


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda weight: weight.div_(2),
    "its data in place": lambda weight: weight.data.mul_(2),
    "transposed": lambda weight: weight.T.clamp_(0),
    "a row": _set,
    "added": _add,
    "a view in place": lambda weight: weight.view(-1).mul_(2),
    "a row in place": lambda weight: weight[0].mul_(2),
    "detached": lambda weight: weight.detach().mul_(2),
    "by torch's functions": nn.init.zeros_,
    "as a result": lambda weight: torch.add(weight, 1, out=weight),
}


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_place_is_refused(kernels: Kernels, name: str, reordered: bool) -> None:
    layer: StoredLinear | ReorderedLinear = StoredLinear(
        kernels, kernels.pack(torch.randn(20, 9, dtype=torch.float32), None)
    )
    if reordered:
        layer = ReorderedLinear(layer, torch.randperm(9, dtype=torch.int64), 9, 20)
    with pytest.raises(WeightChanged), torch.inference_mode():
        CHANGES[name](layer.weight)


def test_layers_can_be_widened(kernels: Kernels) -> None:
    """Where kernels compute wrongly, plain layers take their places."""
    weight, bias = torch.randn(20, 9, dtype=torch.float32), torch.randn(20, dtype=torch.float32)
    model = nn.Sequential(StoredLinear(kernels, kernels.pack(weight, bias)))
    widen_layers(model)
    assert type(model[0]) is nn.Linear
    assert type(model[0].weight) is nn.Parameter
    assert torch.equal(model[0].weight, weight)
    model[0].weight.mul_(2)


def test_a_copy_may_be_read(kernels: Kernels) -> None:
    weight = torch.randn(20, 9, dtype=torch.float32)
    layer = StoredLinear(kernels, kernels.pack(weight, None))
    assert torch.equal(layer.weight, weight)
    order = torch.randperm(9, dtype=torch.int64)
    assert torch.equal(ReorderedLinear(layer, order, 9, 20).weight[:, order], weight)
    product = torch.ones(1, 9, dtype=torch.float32) @ layer.weight.T
    assert type(product) is Tensor
    product.mul_(2)
    other = torch.zeros(20, 9, dtype=torch.float32)
    other.copy_(layer.weight).add_(layer.weight)
    other[:] += layer.weight
    assert torch.equal(other, weight + weight + weight)
    order = torch.randperm(9)
    meant = torch.empty_like(weight)
    meant[:, order] = weight
    assert torch.equal(ReorderedLinear(layer, order, 9, 20).weight, meant)

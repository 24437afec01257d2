"""A layer that holds a packed weight gives copies of it, of which nobody would see a change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.reordered import ReorderedLinear
from engine.compute.cpu.stored_linear import StoredLinear, WeightChanged


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


def test_a_copy_may_be_read(kernels: Kernels) -> None:
    weight = torch.randn(20, 9, dtype=torch.float32)
    layer = StoredLinear(kernels, kernels.pack(weight, None))
    assert torch.equal(layer.weight, weight)
    order = torch.randperm(9, dtype=torch.int64)
    assert torch.equal(ReorderedLinear(layer, order, 9, 20).weight[:, order], weight)
    product = torch.ones(1, 9, dtype=torch.float32) @ layer.weight.T
    assert type(product) is Tensor
    product.mul_(2)

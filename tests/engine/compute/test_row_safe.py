"""Activations inside `RowSafeFunctions`: torch's values, and bits that do not depend on a number's place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compute.row_safe import RowSafeFunctions

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.sigmoid": torch.sigmoid,
    "x.sigmoid()": lambda x: x.sigmoid(),
    "F.sigmoid": F.sigmoid,
    "nn.Sigmoid": nn.Sigmoid(),
    "F.silu": F.silu,
    "F.silu(input=)": lambda x: F.silu(input=x),
    "F.silu in place": lambda x: F.silu(x.clone(), inplace=True),
    "nn.SiLU": nn.SiLU(),
    "F.softplus": F.softplus,
    "F.softplus(beta, threshold)": lambda x: F.softplus(x, 2.0, 5.0),
    "nn.Softplus": nn.Softplus(),
    "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "nn.GELU tanh": nn.GELU(approximate="tanh"),
    "F.gelu": F.gelu,
    "nn.GELU of every other number": lambda x: nn.GELU()(torch.stack([x, x], 1)[:, 0]),
}


def _numbers(count: int) -> Tensor:
    spread = torch.linspace(-30, 30, count // 2)
    return torch.cat([spread, torch.linspace(-3, 3, count - count // 2), torch.tensor([0.0, 1e-7, -1e-7, 300, -300])])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_number_has_the_same_bits_wherever_it_stands(name: str) -> None:
    x = _numbers(70_001)  # more than one thread's share
    threads = torch.get_num_threads()
    with RowSafeFunctions() as functions:
        whole = FUNCTIONS[name](x)
        assert functions.used
        for start in (0, 1, 7, 34_990, 70_000):
            for count in (1, 2, 3, 15, 17, 33):
                assert torch.equal(FUNCTIONS[name](x[start : start + count]), whole[start : start + count])
        torch.set_num_threads(1)
        try:
            assert torch.equal(FUNCTIONS[name](x), whole)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_values_are_those_of_float64(name: str) -> None:
    x = _numbers(5001)
    with RowSafeFunctions():
        mine = FUNCTIONS[name](x)
    exact = FUNCTIONS[name](x.double())
    torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        torch.tanh,
        F.relu,
        lambda x: torch.sigmoid(x.double()),
        lambda x: torch.sigmoid(x.bfloat16()),
        lambda x: torch.sigmoid(x, out=torch.empty_like(x)),
    ],
)
def test_other_functions_and_dtypes_are_torchs_own(function: Callable[[Tensor], Tensor]) -> None:
    x = _numbers(1000)
    with RowSafeFunctions():
        mine = function(x)
    assert torch.equal(mine, function(x))

"""The trials of kernels find what they are for: wrong numbers, and rows whose bits depend on their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from faulty_operations import fault
from torch import Tensor

from engine.compute.attention_mask import KeyRange
from engine.compute.cuda.operations import Operations
from engine.compute.cuda.reference import TorchOperations
from engine.loading.gpu import attention_steps, kernel_trials
from engine.loading.gpu.graph_trial import TinyLayer
from engine.loading.gpu.kernel_trials import SMALL, KernelFault

CPU = torch.device("cpu")
Trial = Callable[[Operations, torch.device, kernel_trials.Sizes], None]
TRIALS: dict[str, Trial] = {
    "linear": partial(kernel_trials.linear, kind="exact"),
    "int8": partial(kernel_trials.linear, kind="int8"),
    "int4": partial(kernel_trials.linear, kind="int4"),
    "rms_norm": kernel_trials.rms_norm,
    "silu_mul": kernel_trials.silu_mul,
    "store": kernel_trials.store,
    "copy_blocks": kernel_trials.copy_blocks,
    "attend": attention_steps.attention,
}
OPERATION = {"int8": "linear", "int4": "linear"}
FEW = replace(SMALL, dtypes=(torch.float32,))


@pytest.mark.parametrize("name", TRIALS)
def test_right_operations_pass(name: str) -> None:
    TRIALS[name](TorchOperations(), CPU, SMALL)


def _one_number(result: Tensor, _: Any) -> Tensor:
    """One number of the last row is a little off: a border that one tile handles in another way."""
    changed = result.clone()
    changed.view(changed.shape[0], -1)[-1, -1] += 0.05
    return changed


def _scaled(result: Tensor, _: Any) -> Tensor:
    """No row depends on another, but all are wrong."""
    return result * 1.01


def _last_bit(result: Tensor, _: Any) -> Tensor:
    """Many rows give other last bits than few, as a product does whose kernel is chosen by their number."""
    return torch.nextafter(result, torch.tensor(9.0, dtype=result.dtype)) if result.shape[0] > 5 else result


def _first_row(result: Tensor, _: Any) -> Tensor:
    """A row's place among the others shows."""
    changed = result.clone()
    changed[0] = torch.nextafter(changed[0], torch.tensor(9.0, dtype=result.dtype))
    return changed


def _not_a_number(result: Tensor, _: Any) -> Tensor:
    changed = result.clone()
    changed[-1] = float("nan")
    return changed


def _fewer_bits(result: Tensor, _: Any) -> Tensor:
    """As sums in TF32 or bfloat16 would have: no row depends on another, but the numbers are too coarse."""
    return result.to(torch.bfloat16).to(result.dtype)


FAULTS = (
    (_scaled, "wrong numbers"),
    (_one_number, "wrong numbers|other bits"),
    (_not_a_number, "wrong numbers|other bits"),
    (_fewer_bits, "wrong numbers"),
    (_last_bit, "other bits"),
    (_first_row, "other bits"),
)
CASES = [
    (name, change, words)
    for name in ("linear", "int8", "int4", "rms_norm", "silu_mul", "attend")
    for change, words in FAULTS
    # The weights of a softmax are rounded to the dtype of values, so attention's bound has to be wider.
    if (name, change) != ("attend", _fewer_bits)
]


@pytest.mark.parametrize(("name", "change", "words"), CASES)
def test_a_fault_is_found(name: str, change: Any, words: str) -> None:
    with pytest.raises(KernelFault, match=words):
        TRIALS[name](fault(OPERATION.get(name, name), change), CPU, FEW)


def test_what_is_no_number_is_near_nothing() -> None:
    right = torch.ones(3, dtype=torch.float64)
    with pytest.raises(KernelFault, match="1 of 3"):
        kernel_trials.expect_near("x", torch.tensor([1.0, float("nan"), 1.0]), right, right)


class _Store(TorchOperations):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def store(
        self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, num_rows: Tensor, finite: Tensor
    ) -> None:
        if self.fault == "padding":
            num_rows = num_rows + 1
        if self.fault == "not finite":
            keys[:, slots[: int(num_rows)]] = key[:, : int(num_rows)]
            values[:, slots[: int(num_rows)]] = value[:, : int(num_rows)]
            return
        if self.fault == "heads":
            key, keys = key[:1], keys[:1]
        if self.fault == "untold":
            finite = finite.clone()
        super().store(key, value, keys, values, slots, num_rows, finite)


@pytest.mark.parametrize("kind", ["padding", "not finite", "heads", "untold"])
def test_a_fault_in_storing_is_found(kind: str) -> None:
    with pytest.raises(KernelFault, match="storing"):
        kernel_trials.store(_Store(kind), CPU, FEW)


class _Copies(TorchOperations):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def copy_blocks(self, tensors: Any, pairs: Tensor, num_pairs: Tensor) -> None:
        if self.fault == "all at once":  # a later pair then reads what was there before
            before = [tensor.clone() for tensor in tensors]
            for source, target in pairs[: int(num_pairs)].tolist():
                for tensor, old in zip(tensors, before, strict=True):
                    tensor[:, 16 * target : 16 * target + 16] = old[:, 16 * source : 16 * source + 16]
        else:
            super().copy_blocks(tensors, pairs, num_pairs + 1)


@pytest.mark.parametrize("kind", ["all at once", "one more"])
def test_a_fault_in_copying_is_found(kind: str) -> None:
    with pytest.raises(KernelFault, match="copying"):
        kernel_trials.copy_blocks(_Copies(kind), CPU, FEW)


def test_every_tile_is_compared() -> None:
    def tiled(x: Tensor, weight: Any, out_dtype: torch.dtype) -> Any:
        result = TorchOperations().linear(x, weight, out_dtype)
        yield "16 × 16", result
        yield "64 × 32", _first_row(result, None)

    with pytest.raises(KernelFault, match="tile 64 × 32"):
        kernel_trials.linear(TorchOperations(), CPU, FEW, "exact", tiled)


class _Narrow(TorchOperations):
    """A decode whose splits are merged in another way than a prompt's: a fault that only mixed steps show."""

    def attend(self, query: Tensor, *rest: Any) -> Tensor:
        result = super().attend(query, *rest)
        return result if query.shape[1] > 5 else torch.nextafter(result, torch.tensor(9.0, dtype=result.dtype))


def test_tokens_one_by_one_are_compared_with_the_prompt() -> None:
    with pytest.raises(KernelFault, match="token by token"):
        attention_steps.attention(_Narrow(), CPU, FEW)


def test_a_window_is_tried() -> None:
    class NoWindow(TorchOperations):
        def attend(self, *arguments: Any) -> Tensor:
            *tensors, shape, settings = arguments
            return super().attend(*tensors, replace(shape, seen=KeyRange()), settings)

    with pytest.raises(KernelFault, match="a window of"):
        attention_steps.attention(NoWindow(), CPU, FEW)


def test_the_layer_of_a_graph_computes_steps_from_its_tensors() -> None:
    """Without a GPU nothing is captured. That a step depends on nothing but the tensors is seen by another order."""
    steps = ((0, 16), (16, 16), (32, 3))
    one, other = (TinyLayer(TorchOperations(), CPU, 48, torch.float32) for _ in range(2))
    for start, count in steps:
        one.load(start, count)
        whole = one.run()[:count].clone()
        for row in range(count):
            other.load(start + row, 1)
            assert torch.equal(other.run()[:1], whole[row : row + 1]), (start, row)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)

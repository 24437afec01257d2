"""Norms and activations have torch's bits and know one row; the cache gets finite numbers, and blocks in order."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with a CUDA build of torch, or with the development tools")

import interpreter

from engine.compute.cuda.kernels import rows
from engine.compute.cuda.operations import NormKind
from engine.scheduling.block_pool import BLOCK_SIZE

interpreter.install()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.bfloat16 if DEVICE == "cpu" else None
"""The dtype that has torch's bits. A GPU's torch sums in an order of its own, and its functions are approximations."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS: tuple[NormKind, ...] = get_args(NormKind)


def normal(*shape: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * spread).to(DEVICE, dtype)


def int32(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def torch_norm(x: Tensor, weight: Tensor, kind: NormKind) -> Tensor:
    """As Llama's and Gemma's modules of transformers write it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype) if kind == "weight" else (wide * (1.0 + weight.float())).to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_has_the_bits_of_torch_in_bfloat16_and_its_numbers_else(dtype: torch.dtype, kind: NormKind) -> None:
    """In float16 and float32 the order of the sum shows, which is torch's own."""
    for size in (64, 300, 1024):
        x, weight = normal(9, size, dtype=dtype, spread=3.0), normal(size, dtype=dtype)
        result, expected = rows.rms_norm(x, weight, 1e-6, kind), torch_norm(x, weight, kind)
        if dtype == EXACT:
            assert torch.equal(result, expected)
        else:
            torch.testing.assert_close(result, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_knows_one_row(dtype: torch.dtype) -> None:
    x, weight = normal(40, 96, dtype=dtype), normal(96, dtype=dtype)
    whole = rows.rms_norm(x, weight, 1e-6, "weight")
    assert torch.equal(rows.rms_norm(x[7:8], weight, 1e-6, "weight"), whole[7:8])
    assert torch.equal(rows.rms_norm(x[::3], weight, 1e-6, "weight"), whole[::3]), "rows of another stride"


def test_heads_are_normalised_where_they_lie() -> None:
    """The heads of a product of query, key and value: rows of which the heads are a part."""
    product, weight = normal(5, 2 * 16 + 7, dtype=torch.float32), normal(16, dtype=torch.float32)
    heads = product[:, 4:36].view(5, 2, 16)
    result = rows.rms_norm(heads, weight, 1e-6, "one plus weight")
    assert torch.equal(result, rows.rms_norm(heads.reshape(10, 16), weight, 1e-6, "one plus weight").view(5, 2, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_has_the_bits_of_torch_in_bfloat16_and_its_numbers_else(dtype: torch.dtype) -> None:
    """Of any float32, `exp` may differ in its last bit; narrower dtypes hide it, but not always in float16."""
    for size in (7, 1500):
        gate_up = normal(5, 2 * size + 3, dtype=dtype, spread=4.0)[:, : 2 * size]
        result, expected = rows.silu_mul(gate_up), F.silu(gate_up[:, :size]) * gate_up[:, size:]
        if dtype == EXACT:
            assert torch.equal(result, expected)
        else:
            torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(rows.silu_mul(gate_up[2:3]), result[2:3])


class Stored:
    """Seven rows, the last two of them padding, stored in a cache of 64 slots."""

    SLOTS = (5, 9, 33, 40, 63, 0, 0)

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.keys, self.values = (
            torch.full((t.shape[0], 64, t.shape[2]), 7.0, dtype=t.dtype, device=DEVICE) for t in (key, value)
        )
        self.finite = int32([1] * 7)
        slots = torch.tensor(self.SLOTS, device=DEVICE)
        rows.store(key, value, self.keys, self.values, slots, int32([5]), self.finite)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dims"), [(2, (24, 24)), (3, (16, 8)), (5, (2048, 16))])
def test_rows_are_stored_in_their_slots(dtype: torch.dtype, heads: int, dims: tuple[int, int]) -> None:
    """The last case has more heads than are read at once."""
    key = normal(7, heads, dims[0], dtype=dtype).transpose(0, 1)  # heads lie beside each other, as a model makes them
    value = normal(heads, 7, dims[1], dtype=dtype)
    stored = Stored(key, value)
    for cache, new in ((stored.keys, key), (stored.values, value)):
        expected = torch.full_like(cache, 7.0)
        expected[:, Stored.SLOTS[:5]] = new[:, :5]
        assert torch.equal(cache, expected)
    assert stored.finite.tolist() == [1] * 7


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dims", [(24, 24), (2048, 16)])
def test_a_row_that_is_not_finite_in_one_head_is_zeros_in_all(dims: tuple[int, int], broken: float) -> None:
    key, value = normal(5, 7, dims[0], dtype=torch.float16), normal(5, 7, dims[1], dtype=torch.float16)
    key[4, 1, -1] = value[0, 3, 2] = broken
    key[2, 4] = 60000.0  # finite, though their sum is not
    key[0, 6] = broken  # padding
    stored = Stored(key, value)
    assert stored.finite.tolist() == [1, 0, 1, 0, 1, 1, 1]
    for cache, new in ((stored.keys, key), (stored.values, value)):
        assert not cache[:, [Stored.SLOTS[1], Stored.SLOTS[3]]].any()
        assert torch.equal(cache[:, [5, 33, 63]], new[:, [0, 2, 4]])


def test_what_another_layer_noted_stays_noted() -> None:
    key = normal(1, 7, 16, dtype=torch.float32)
    finite = int32([1, 0, 1, 1, 1, 1, 1])
    cache, slots = torch.zeros(1, 64, 16, device=DEVICE), torch.arange(1, 8, device=DEVICE)
    rows.store(key, key, cache, cache.clone(), slots, int32([7]), finite)
    assert finite.tolist() == [1, 0, 1, 1, 1, 1, 1]


def test_blocks_are_copied_in_the_order_of_the_pairs() -> None:
    """A later pair reads what an earlier one wrote; pairs behind the last are not read."""
    shapes = ((2, 24, torch.float32), (3, 8, torch.bfloat16), (1, 40, torch.float16))
    tensors = [normal(heads, 6 * BLOCK_SIZE, dim, dtype=dtype) for heads, dim, dtype in shapes]
    pairs = ((0, 1), (1, 2), (4, 1), (2, 4), (5, 0))
    expected = [tensor.clone() for tensor in tensors]
    for tensor in expected:
        blocks = tensor.view(tensor.shape[0], 6, BLOCK_SIZE, -1)
        for source, target in pairs[:4]:
            blocks[:, target] = blocks[:, source]
    rows.copy_blocks(rows.CacheTable(tensors), int32(pairs), int32([4]))
    for tensor, right in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, right)


class _Noted:
    """A kernel that notes what it is launched with, and computes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *given, **options: self.calls.append(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wide", [3 * 64, 3 * 64 + 8, 3 * 64 + 1])
@pytest.mark.parametrize("first", [0, 8, 64])
def test_a_norm_of_a_part_of_a_wider_tensor_is_computed_by_one_kernel(
    wide: int, first: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles by whether addresses and strides are multiples of 16: that may not depend on the rows."""
    noted = _Noted()
    monkeypatch.setattr(rows, "_rms_norm", noted)
    for count in (1, 2, 5):
        part = torch.zeros(count, wide, dtype=dtype)[:, first : first + 64]
        rows.rms_norm(part, torch.ones(64, dtype=dtype), 1e-6, "weight")
        rows.rms_norm(part.view(count, 2, 32), torch.ones(32, dtype=dtype), 1e-6, "weight")
    for given in noted.calls:
        x, outer, inner = given[0], given[6], given[7]
        assert x.data_ptr() % 16 == 0
        assert (outer % 16, inner % 16) == (0, 0)

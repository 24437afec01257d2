"""The linear kernel, interpreted (or on a GPU where there is one): right, and every number one chain along k."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels of the CUDA path are written in Triton")

import interpreter

from engine.compute.cuda import tiles, weights
from engine.compute.cuda.kernels.linear import linear
from engine.compute.cuda.operations import LinearWeight
from engine.compute.cuda.tiles import Tile, tile_for, tiles_of

interpreter.install()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("exact", "int8", "int4", "int4 zeros")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weight(kind: str, dtype: torch.dtype, n: int, k: int, bias: bool = True, group: int = 64) -> LinearWeight:
    """Make a weight of random numbers, with zero points of its own where `kind` says so."""
    plain, offset = numbers(n, k, seed=1), numbers(n, seed=2).to(dtype) if bias else None
    if kind == "exact":
        weight = weights.exact(plain.to(dtype), offset)
    elif kind == "int8":
        weight = weights.int8(plain, offset)
    else:
        weight = weights.int4(plain, offset, group)
    zeros = None
    if kind == "int4 zeros":
        assert weight.scale is not None
        zeros = torch.randint(0, 16, weight.scale.shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    moved = [None if t is None else t.to(DEVICE) for t in (weight.scale, weight.bias, zeros)]
    return LinearWeight(weight.data.to(DEVICE), weight.kind, *moved)


def table_tile(weight: LinearWeight, x: Tensor, rows: int | None = None) -> Tile:
    return tile_for("ada", weight.kind, x.itemsize, rows or len(x), weight.out_features, weight.group)


def stated_chain(x: Tensor, weight: LinearWeight) -> Tensor:
    """Compute what the kernel states, one addition in float32 after the other, in torch: `[rows, out] float32`."""
    wide = x.to(torch.float32)
    total = torch.zeros(len(x), weight.out_features)
    if weight.kind != "int4":
        for k in range(x.shape[1]):
            total += wide[:, k, None] * weight.data[:, k].to(torch.float32)
        total = total if weight.scale is None else total * weight.scale
    else:
        assert weight.scale is not None
        ones = LinearWeight(weight.data, "int4", torch.ones_like(weight.scale), None, weight.zeros)
        factors = weights.widened(ones)
        for group in range(weight.scale.shape[1]):
            part = torch.zeros_like(total)
            for k in range(group * weight.group, (group + 1) * weight.group):
                part += wide[:, k, None] * factors[:, k]
            total += part * weight.scale[:, group]
    return total if weight.bias is None else total + weight.bias.to(torch.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_product_is_right(dtype: torch.dtype, kind: str, bias: bool) -> None:
    """Off by no more than float32 sums and one rounding of the result allow; k is no multiple of a block."""
    n, k = 40, 192 if kind.startswith("int4") else 200
    x, weight = numbers(5, k).to(dtype).to(DEVICE), make_weight(kind, dtype, n, k, bias)
    wide, factors = x.double(), weights.widened(weight).double()
    right = wide @ factors.t() + (0 if weight.bias is None else weight.bias.double())
    size = wide.abs() @ factors.abs().t() + right.abs()
    for out in FLOATS:
        y = linear(x, weight, out, table_tile(weight, x))
        assert y.dtype == out
        assert y.shape == right.shape
        allowed = size * k * 2.0**-24 + right.abs() * torch.finfo(out).eps + 1e-7
        assert ((y.double() - right).abs() <= allowed).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="matrix units have an order of their own within 8 or 16 numbers")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_is_the_chain_that_is_stated(dtype: torch.dtype, kind: str) -> None:
    """k after k in one sum; an int4 group is summed by itself and then scaled; bias and rounding come last.

    With float32 inputs every step rounds; bfloat16 times whole numbers of four bits may be exact in any order.
    """
    k = 192 if kind.startswith("int4") else 200
    x, weight = numbers(3, k).to(dtype), make_weight(kind, dtype, 20, k)
    chain = stated_chain(x, weight)
    for out in FLOATS:
        assert torch.equal(linear(x, weight, out, table_tile(weight, x)), chain.to(out))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in FLOATS[:2])])
def test_a_row_depends_on_itself_alone(dtype: torch.dtype, kind: str) -> None:
    """In every tile that the table has, among any rows and alone, each row has the same bits."""
    n, k = 40, 192 if kind.startswith("int4") else 200
    x, weight = numbers(67, k).to(dtype).to(DEVICE), make_weight(kind, dtype, n, k)
    whole = linear(x, weight, dtype, table_tile(weight, x, rows=1))
    every = {t for gpu in tiles.TABLE for t in tiles_of(gpu, weight.kind, x.itemsize, weight.group)}
    assert len({t.block_m for t in every}) > 1
    for tile in sorted(every, key=repr):
        assert torch.equal(linear(x[:19], weight, dtype, tile), whole[:19]), tile
    for first, last in ((0, 1), (5, 6), (66, 67), (3, 20), (1, 67)):
        rows = x[first:last]
        assert torch.equal(linear(rows, weight, dtype, table_tile(weight, rows)), whole[first:last]), (first, last)


@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_the_tile_changes_no_bit(block_m: int, block_n: int) -> None:
    """Tiles that the table does not have, too: what a later table may choose is as lawful."""
    for kind, group in (("exact", 0), ("int8", 0), ("int4", 32)):
        weight = make_weight(kind, torch.float16, 24, 64, group=group or 64)
        x = numbers(20, 64).to(torch.float16).to(DEVICE)
        block_k = table_tile(weight, x).block_k
        one = linear(x, weight, torch.float32, Tile(16, 16, block_k, 4, 3))
        assert torch.equal(linear(x, weight, torch.float32, Tile(block_m, block_n, block_k, 4, 3)), one)


@pytest.mark.parametrize("kind", ["exact", "int8", "int4"])
def test_another_chain_has_other_bits(kind: str) -> None:
    """The tests above can see: a split of k, or groups of another size, change the result."""
    x, weight = numbers(3, 256).to(torch.bfloat16).to(DEVICE), make_weight(kind, torch.bfloat16, 40, 256, bias=False)
    one = linear(x, weight, torch.float32, table_tile(weight, x))
    if kind == "int4":
        assert weight.scale is not None
        wider = weights.int4(weights.widened(weight), None, 64)  # the same numbers in groups of 32
        assert torch.equal(weights.widened(wider), weights.widened(weight))
        pairs = weights._packed(_numbers(wider).reshape(40, -1, 32), 32)
        halves = LinearWeight(pairs, "int4", wider.scale.repeat_interleave(2, dim=1))
        assert torch.equal(weights.widened(halves), weights.widened(weight))
        other = linear(x, halves, torch.float32, table_tile(halves, x))
    else:
        parts = [LinearWeight(d.contiguous(), weight.kind, weight.scale) for d in weight.data.split(128, dim=1)]
        tile = table_tile(weight, x)
        other = sum(linear(x[:, at : at + 128], p, torch.float32, tile) for at, p in zip((0, 128), parts, strict=True))
    assert torch.allclose(other, one, rtol=1e-3, atol=1e-3)
    assert not torch.equal(other, one)


def _numbers(weight: LinearWeight) -> Tensor:
    assert weight.scale is not None
    plain = LinearWeight(weight.data, "int4", torch.ones_like(weight.scale))
    return (weights.widened(plain) + 8).to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_layers_have_the_bits_of_each(kind: str) -> None:
    """Queries, keys and values as one product: every number is what it is alone."""
    x = numbers(4, 192).to(torch.bfloat16).to(DEVICE)
    parts = [make_weight(kind, torch.bfloat16, n, 192) for n in (40, 24, 8)]
    if kind == "int4 zeros":
        parts[1] = make_weight("int4", torch.bfloat16, 24, 192)  # one of them without zero points
    merged = weights.concatenated(parts)
    apart = torch.cat([linear(x, p, torch.bfloat16, table_tile(p, x)) for p in parts], dim=1)
    assert torch.equal(linear(x, merged, torch.bfloat16, table_tile(merged, x)), apart)


def test_rows_may_lie_apart(tmp_path: Path) -> None:
    """A piece of a wider input, a single row of any stride, and rows two gigabytes apart (offsets of 64 bits)."""
    weight = make_weight("exact", torch.float16, 20, 48)
    x = numbers(3, 48).to(torch.float16).to(DEVICE)
    one = linear(x, weight, torch.float16, table_tile(weight, x))
    wide = torch.cat([x, x + 1], dim=1)[:, :48]
    assert wide.stride(0) == 96
    assert torch.equal(linear(wide, weight, torch.float16, table_tile(weight, x)), one)
    single = x[1:2].clone().as_strided((1, 48), (1, 1))
    assert torch.equal(linear(single, weight, torch.float16, table_tile(weight, x)), one[1:2])
    if DEVICE == "cpu":
        stride = 2**30
        memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=2 * stride + 48, dtype=torch.float16)
        apart = memory.as_strided((3, 48), (stride, 1))  # a sparse file: nearly nothing of it exists
        apart.copy_(x)
        assert torch.equal(linear(apart, weight, torch.float16, table_tile(weight, x)), one)


@pytest.mark.parametrize("rows", [128, 150])
def test_more_tiles_of_rows_than_share_a_column(rows: int) -> None:
    """Programs go through eight tiles of rows before the next columns; the last eight may be fewer."""
    weight, x = make_weight("exact", torch.float16, 40, 32), numbers(rows, 32).to(torch.float16).to(DEVICE)
    one = linear(x, weight, torch.float16, Tile(256, 64, 32, 4, 3))
    assert torch.equal(linear(x, weight, torch.float16, Tile(16, 16, 32, 4, 3)), one)


def test_no_rows_are_a_product_too() -> None:
    weight = make_weight("exact", torch.float16, 20, 48)
    assert linear(torch.empty(0, 48, dtype=torch.float16), weight, torch.float32, Tile(16, 16, 128, 4, 3)).shape == (
        0,
        20,
    )


def test_nothing_behind_the_last_row_or_column_is_written() -> None:
    """Tiles reach over the edge; what lies there stays, and not-a-numbers there change nothing."""
    x = numbers(20, 48).to(torch.float16).to(DEVICE)
    x[5:] = torch.nan
    weight = make_weight("exact", torch.float16, 20, 48)
    y = linear(x, weight, torch.float16, Tile(16, 16, 128, 4, 3))
    assert y[:5].isfinite().all()
    assert y[5:].isnan().all()
    assert torch.equal(y[:5], linear(x[:5], weight, torch.float16, Tile(64, 32, 128, 4, 3)))


def test_inputs_of_another_dtype_are_refused() -> None:
    """A weight narrowed in silence would be another model."""
    weight = make_weight("exact", torch.float32, 20, 48)
    with pytest.raises(AssertionError):
        linear(numbers(2, 48).to(torch.float16), weight, torch.float16, Tile(16, 16, 32, 4, 3))
    with pytest.raises(AssertionError):
        linear(numbers(2, 64), make_weight("int4", torch.float32, 20, 64), torch.float32, Tile(16, 16, 32, 4, 3))

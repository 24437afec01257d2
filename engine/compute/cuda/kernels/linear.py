"""Linear layers as one Triton kernel: each number of the product is one chain along k, whatever the tile.

A program computes a tile of the product and goes through all of k by itself, in blocks from the first to the last, so
the bits of a number depend neither on how many rows there are nor on the tile's height or width, which may therefore be
chosen by the number of rows (`engine.compute.cuda.tiles`). Rows behind the last are zeros and are not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.compute.cuda.operations import LinearWeight
from engine.compute.cuda.tiles import Tile

__all__ = ["linear", "linear_kernel"]


@triton.jit
def _float(numbers, zero):
    """Compute `numbers - zero` in float32, exactly: the bits of a small number set in those of 2 ** 23 add it.

    A conversion would take instructions of a slower unit; this takes additions.
    """
    return (numbers.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)


@triton.jit(do_not_specialize=["m"])  # one compiled kernel for every number of rows
def linear_kernel(
    x,
    weight,
    scale,
    zeros,
    bias,
    y,
    m,
    n,
    k,
    stride_weight,
    stride_x,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `y[m, n] = x[m, k] @ weight[n, k].T (* scale) (+ bias)`, summed in float32, rounded once.

    KIND: of the weight, see `LinearWeight`. GROUP: numbers of an int4 weight that share a scale; BLOCK_K is the same.
    WHOLE_K: k is a multiple of BLOCK_K. `x` has rows `stride_x` apart, everything else is contiguous.
    """
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    width = 8 * tiles_n  # eight tiles of rows read the same weights at about the same time, out of the L2 cache
    first = program // width * 8
    height = min(tiles_m - first, 8)
    rows = (first + program % width % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = program % width // height * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = (rows < m)[:, None], columns < n
    x += rows.to(tl.int64)[:, None] * stride_x
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if KIND == "int4":
        HALF: tl.constexpr = GROUP // 2  # of a group: its first half is in the low nibbles, its second in the high ones
        half = tl.arange(0, HALF)[None, :]
        weight += columns.to(tl.int64)[:, None] * stride_weight + half
        scale += columns.to(tl.int64) * (k // GROUP)
        zeros += columns.to(tl.int64) * (k // GROUP)
        for group in range(0, k // GROUP):
            low_x = tl.load(x + group * GROUP + half, mask=in_rows, other=0.0)
            high_x = tl.load(x + group * GROUP + HALF + half, mask=in_rows, other=0.0)
            pairs = tl.load(weight + group * HALF, mask=in_columns[:, None], other=0)
            zero = tl.load(zeros + group, mask=in_columns, other=0).to(tl.float32)[:, None] if HAS_ZEROS else 8.0
            low = _float(pairs & 15, zero).to(x.dtype.element_ty)
            high = _float(pairs >> 4, zero).to(x.dtype.element_ty)
            part = tl.dot(low_x, low.trans(), input_precision="ieee")
            part = tl.dot(high_x, high.trans(), part, input_precision="ieee")
            total += part * tl.load(scale + group, mask=in_columns, other=0.0)[None, :]
    else:
        depth = tl.arange(0, BLOCK_K)[None, :]
        weight += columns.to(tl.int64)[:, None] * stride_weight
        for start in range(0, k, BLOCK_K):
            at = start + depth
            if WHOLE_K:
                some_x = tl.load(x + at, mask=in_rows, other=0.0)
                some = tl.load(weight + at, mask=in_columns[:, None], other=0)
            else:
                some_x = tl.load(x + at, mask=in_rows & (at < k), other=0.0)
                some = tl.load(weight + at, mask=in_columns[:, None] & (at < k), other=0)
            total = tl.dot(some_x, some.to(x.dtype.element_ty).trans(), total, input_precision="ieee")
        if KIND == "int8":
            total *= tl.load(scale + columns, mask=in_columns, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    y += rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(y, total.to(y.dtype.element_ty), mask=in_rows & in_columns[None, :])


def linear(x: Tensor, weight: LinearWeight, out_dtype: torch.dtype, tile: Tile) -> Tensor:
    """Compute `x @ weight.T + bias` on the device of `x`.

    Args:
        x: `[rows, in]`, the last dimension contiguous; of the weight's dtype if that is exact.

    Returns:
        `[rows, out]` of `out_dtype`.
    """
    rows, depth = x.shape
    data, scale, bias = weight.data, weight.scale, weight.bias
    group = weight.group
    assert depth == weight.in_features, (x.shape, data.shape)
    assert x.stride(1) == 1
    assert data.is_contiguous()
    assert weight.kind != "exact" or data.dtype == x.dtype, (data.dtype, x.dtype)
    assert weight.kind != "int4" or tile.block_k == group, (tile, group)
    y = torch.empty(rows, weight.out_features, dtype=out_dtype, device=x.device)
    if rows:
        linear_kernel[(triton.cdiv(rows, tile.block_m) * triton.cdiv(weight.out_features, tile.block_n),)](
            x,
            data,
            data if scale is None else scale,
            data if weight.zeros is None else weight.zeros,
            data if bias is None else bias,
            y,
            rows,
            weight.out_features,
            depth,
            data.shape[1],  # not computed from k in the kernel: its divisibility decides how wide loads are
            x.stride(0) if rows > 1 else depth,  # torch gives a single row any stride; each kind is another kernel
            KIND=weight.kind,
            GROUP=group,
            HAS_ZEROS=weight.zeros is not None,
            HAS_BIAS=bias is not None,
            WHOLE_K=depth % tile.block_k == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
    return y

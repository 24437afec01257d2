"""Weights in groups of any kind, and a plain statement in numpy of what a product with them is. Only for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.compute.whole.groups import Groups

Float32 = NDArray[np.float32]

KINDS: tuple[tuple[str, int | str, str | None], ...] = (
    ("float16", 0, None),
    ("float16", 8, None),  # Q4_0
    ("float16", 0, "float16"),  # Q4_1
    ("bfloat16", "columns", None),  # GPTQ
    ("float32", "columns", "float32"),
    ("uint8+float16", 0, "uint8+float16"),  # Q4_K
    ("int8+float16", 32, None),  # Q6_K
    ("int8+float32", 3, "float32"),
    ("uint8+bfloat16", 0, "int8+bfloat16"),
)
"""Scales, zeros and minima, each as it is stored: two levels as `numbers+supers`."""


def groups_of(
    bits: int, group: int, kind: tuple[str, int | str, str | None], columns: int, depth: int, seed: int = 0
) -> Groups:
    """Draw a weight `[columns, depth]`."""
    draw = torch.Generator().manual_seed(seed + bits * 1000 + group + columns + depth)
    scale, zeros, minimum = kind
    count, per = -(-depth // group), 256 // group

    def part(kind: str) -> tuple[Tensor, Tensor | None]:
        stored, _, above = kind.partition("+")
        floats = torch.randn(columns, -(-count // per) if above else count, generator=draw, dtype=torch.float32) * 0.01
        if not above:
            return floats.to(getattr(torch, stored)), None
        low, high = (0, 64) if stored == "uint8" else (-128, 128)
        whole = torch.randint(low, high, (columns, count), generator=draw, dtype=torch.int64)
        return whole.to(getattr(torch, stored)), floats.to(getattr(torch, above))

    scales, supers = part(scale)
    minima, minimum_supers = (None, None) if minimum is None else part(minimum)
    return Groups(
        torch.randint(0, 2**bits, (columns, depth), generator=draw, dtype=torch.uint8),
        bits,
        group,
        scales,
        supers,
        minima,
        minimum_supers,
        zeros
        if isinstance(zeros, int)
        else torch.randint(0, 2**bits, (columns, count), generator=draw, dtype=torch.uint8),
        per,
    )


def product(groups: Groups, x: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply as grouped_products.h states it: `x [rows, depth]` → `[rows, columns]`."""
    step = min(groups.group, 32)  # numbers of one step of a chain
    spread = max(groups.group // step, 1)
    scales, minima = _of_steps(groups.scales, groups.supers, groups.per, spread), None
    if groups.minima is not None:
        minima = _of_steps(groups.minima, groups.minimum_supers, groups.per, spread)
    if isinstance(groups.zeros, Tensor):
        zeros = groups.zeros.numpy().astype(np.int64).repeat(spread, axis=1)
    else:
        zeros = np.full(scales.shape, groups.zeros, np.int64)
    depth = -(-groups.depth // 32) * 32
    numbers = np.zeros((groups.columns, depth), np.int64)
    numbers[:, : groups.depth] = groups.numbers.numpy()
    quantised, x_scales = _rounded(x, depth)
    out = np.zeros((x.shape[0], groups.columns), np.float32)
    for i in range(-(-groups.depth // step)):
        q, bytes_ = numbers[:, i * step : (i + 1) * step], quantised[:, i * step : (i + 1) * step]
        x_scale, sums = x_scales[:, i * step // 32, None], bytes_.sum(1)[:, None]
        whole = bytes_ @ q.T - sums * zeros[:, i]
        out = _fma(whole.astype(np.float32), x_scale * scales[None, :, i], out)
        if minima is not None:
            out = _fma(-minima[None, :, i], x_scale * sums.astype(np.float32), out)
    return torch.from_numpy(out) + (0 if bias is None else bias)


def _of_steps(values: Tensor, supers: Tensor | None, per: int, spread: int) -> Float32:
    wide = values.to(torch.float32).numpy()
    if supers is not None:
        wide = wide * supers.to(torch.float32).numpy().repeat(per, axis=1)[:, : wide.shape[1]]
    return wide.repeat(spread, axis=1)


def _rounded(x: Tensor, depth: int) -> tuple[NDArray[np.int64], Float32]:
    """Bytes `[rows, depth]` and scales `[rows, depth / 32]` of an input."""
    padded = np.zeros((x.shape[0], depth), np.float32)
    padded[:, : x.shape[1]] = x.numpy()
    pieces = padded.reshape(x.shape[0], -1, 32)
    largest = np.abs(pieces).max(-1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, 0).astype(np.float32)
    inverse[inverse > 3.0e38] = 0
    bytes_ = np.rint(pieces * inverse[..., None]).astype(np.int64)
    return bytes_.reshape(x.shape[0], -1), np.where(inverse > 0, largest / np.float32(127), 0).astype(np.float32)


def _fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """`a · b + c`, rounded once: the product is exact in float64, and a sum rounded to odd may be rounded again."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    result: Any = np.where((error != 0) & even, odd, total)
    return result.astype(np.float32)

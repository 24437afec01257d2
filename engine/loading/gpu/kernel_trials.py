"""Try the operations of the CUDA path: against float64, and bit by bit between numbers of rows, tiles and steps.

Each trial takes any `Operations` and raises `KernelFault` with what was wrong. Inputs are quasi-random numbers of every
size and sign, because equal terms would hide another order of summation. Knows no model; attention has its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compute.cuda.operations import LinearWeight, NormKind, Operations
from engine.scheduling.block_pool import BLOCK_SIZE
from engine.types.gpu import WeightKind

__all__ = ["FULL", "SMALL", "KernelFault", "Sizes", "Tiled", "copy_blocks", "linear", "numbers", "rms_norm", "silu_mul"]

Tiled = Callable[[Tensor, LinearWeight, torch.dtype], Iterator[tuple[str, Tensor]]]
"""Computes a linear layer once with every tile that may be chosen for it: `(tile, result)`."""

_GROUP, _SMALL_GROUP = 128, 32
"""Columns of an int4 weight that share a scale."""
_STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half a step between neighbouring numbers, as a share of the number: what rounding once may cost."""


class KernelFault(Exception):
    """An operation computes something else than it should; the message says where."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the trials are.

    Attributes:
        rows: numbers of rows that are compared, on both sides of every border between tiles.
        linear: `(out, in)` of linear layers, one for each class of columns in the table of tiles; the second is the
            odd one: `in` a multiple of 32, of 128 in the others.
        row: lengths of rows of norms and activations.
        dtypes: of inputs; everything is tried in the first.
        keys: of the longest sequence; head_dims, groups: of attention; piece: rows of a chunk.
    """

    rows: tuple[int, ...]
    linear: tuple[tuple[int, int], ...]
    row: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    keys: int
    head_dims: tuple[int, ...]
    groups: tuple[int, ...]
    piece: int


FULL = Sizes(
    rows=(1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 512),
    linear=((256, 512), (1000, 352), (1040, 2048), (8200, 1024), (32_784, 256)),
    row=(128, 1024, 5120, 12_288),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    keys=1100,
    head_dims=(64, 128, 256),
    groups=(1, 4, 7),
    piece=170,
)
SMALL = Sizes(
    rows=(1, 2, 5, 16, 17, 33),
    linear=((24, 128), (40, 96), (48, 256)),
    row=(32, 96),
    dtypes=(torch.bfloat16, torch.float32),
    keys=300,
    head_dims=(16,),
    groups=(2,),
    piece=70,
)
"""For a rehearsal on a CPU."""


def numbers(shape: Sequence[int], dtype: torch.dtype, device: torch.device, shift: int = 0) -> Tensor:
    """Make quasi-random numbers between -1 and 1, the same everywhere; another `shift`, other numbers."""
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(count, dtype=torch.float64) * (2 * shift + 1) + 0.37 * shift
    data = index.mul_(0.618033988749).frac_().sub_(0.5).mul_(2.0)
    return data.view(*shape).to(dtype).to(device)


def expect_near(what: str, found: Tensor, right: Tensor, allowed: Tensor) -> None:
    """Raise if a number is farther from the right one than allowed, or is none. All three have one shape."""
    away = (found.double() - right).abs()
    wrong = ~(away <= allowed)  # a number that is not finite is wrong, too
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        raise KernelFault(
            f"wrong numbers: {what}: {int(wrong.sum())} of {wrong.numel()}, the first {float(found.flatten()[at]):.4g} "
            f"for {float(right.flatten()[at]):.4g}"
        )


def expect_same(what: str, found: Tensor, other: Tensor) -> None:
    """Raise unless all bits are the same."""
    if found.shape != other.shape:
        raise KernelFault(f"a result of another shape: {what}: {tuple(found.shape)}, not {tuple(other.shape)}")
    if not torch.equal(found, other):
        count = int((found != other).sum())
        raise KernelFault(f"other bits: {what}: {count} of {found.numel()} numbers differ")


def expect_independent_rows(what: str, compute: Callable[[Tensor], Tensor], x: Tensor, rows: Sequence[int]) -> Tensor:
    """Compute `x [rows, …]` whole and in parts; raise if a row's bits depend on it. Returns the whole result."""
    whole = compute(x)
    for count in rows:
        if count < x.shape[0]:
            expect_same(f"{what}, the first {count} of {x.shape[0]} rows", compute(x[:count]), whole[:count])
            expect_same(f"{what}, the last {count} of {x.shape[0]} rows", compute(x[-count:]), whole[-count:])
    middle = x.shape[0] // 2
    expect_same(f"{what}, row {middle} alone", compute(x[middle : middle + 1]), whole[middle : middle + 1])
    return whole


# -- linear layers ----------------------------------------------------------------------------------------------------


def linear(
    operations: Operations, device: torch.device, sizes: Sizes, kind: WeightKind, tiled: Tiled | None = None
) -> None:
    """Try linear layers: with every number of rows, both kinds of output, with and without a bias, with every tile.

    Every combination is a kernel to compile, so a dtype's second shape is tried only where it may matter.
    """
    first, *others = sizes.linear
    for dtype in sizes.dtypes:
        for number, shape in enumerate([first, *others] if dtype == sizes.dtypes[0] else [first]):
            last = len(sizes.linear) > 1 and number == len(others)
            trial = _LinearTrial(operations, device, kind, shape, dtype, odd=number == 1)
            trial.run(sizes.rows, dtype, tiled if number == 0 else None)
            if last and dtype != torch.float32:  # an output layer
                trial.run(sizes.rows, torch.float32, None)


class _LinearTrial:
    """One layer. `odd`: with a bias, and int4 weights in small groups with zeros of their own."""

    def __init__(
        self,
        operations: Operations,
        device: torch.device,
        kind: WeightKind,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        odd: bool,
    ) -> None:
        self._operations, self._dtype, self._device = operations, dtype, device
        self._bias = numbers((shape[0],), dtype, device, 5) if odd else None
        group = _SMALL_GROUP if odd else _GROUP
        self._weight, self._exact = _weight(kind, shape, dtype, device, self._bias, group, zeros=odd)
        self._what = f"a linear layer, {kind}, {shape[0]} × {shape[1]}, {_name(dtype)}"

    def run(self, rows: Sequence[int], out_dtype: torch.dtype, tiled: Tiled | None) -> None:
        x = numbers((max(rows), self._exact.shape[1]), self._dtype, self._device, 1)
        what = f"{self._what} to {_name(out_dtype)}"

        def compute(part: Tensor) -> Tensor:
            return self._operations.linear(part, self._weight, out_dtype)

        found = expect_independent_rows(what, compute, x, rows)
        right, allowed = _product(x, self._exact, self._bias, out_dtype)
        expect_near(what, found, right, allowed)
        for tile, other in tiled(x, self._weight, out_dtype) if tiled else ():
            expect_same(f"{what}, tile {tile}", other, found)


def _weight(
    kind: WeightKind,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    bias: Tensor | None,
    group: int,
    *,
    zeros: bool,
) -> tuple[LinearWeight, Tensor]:
    """Make a weight, and the numbers that it stands for: `[out, in] float64`."""
    if kind == "exact":
        data = numbers(shape, dtype, device, 2)
        return LinearWeight(data, bias=bias), data.double()
    levels = 254 if kind == "int8" else 15
    whole = ((numbers(shape, torch.float32, device, 2) + 1.0) * (levels / 2)).round().to(torch.int16)
    if kind == "int8":
        scale = (numbers(shape[:1], torch.float32, device, 3) + 1.5) / 127
        signed = (whole - 127).to(torch.int8)
        return LinearWeight(signed, "int8", scale, bias), signed.double() * scale.double()[:, None]
    groups = (shape[0], shape[1] // group)
    scale = (numbers(groups, torch.float32, device, 3) + 1.5) / 8
    zero = ((numbers(groups, torch.float32, device, 4) + 1.0) * 7.5).round().to(torch.uint8) if zeros else None
    halves = whole.view(shape[0], -1, 2, group // 2)  # low nibbles: the first half of a group's columns
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).to(torch.uint8).flatten(1)
    wide = whole.view(shape[0], -1, group).double() - (8.0 if zero is None else zero.double()[:, :, None])
    exact = (wide * scale.double()[:, :, None]).flatten(1)
    return LinearWeight(packed, "int4", scale, bias, zero), exact


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute a product in float64, and how far from it sums in float32 that are rounded once may be.

    A matrix unit may cut each step of a sum off to 24 bits, so the bound counts a step for every eight products.
    """
    wide = x.double()
    right, size = wide @ weight.t(), wide.abs() @ weight.abs().t()
    if bias is not None:
        right, size = right + bias.double(), size + bias.double().abs()
    steps = x.shape[1] / 8 + 4
    return right, size * (steps * 2.0**-24) + right.abs() * (2 * _STEP[out_dtype]) + 1e-7


# -- rows -------------------------------------------------------------------------------------------------------------


def rms_norm(operations: Operations, device: torch.device, sizes: Sizes) -> None:
    """Try both kinds of norm."""
    kinds: tuple[NormKind, ...] = ("weight", "one plus weight")
    for length in sizes.row:
        for dtype in sizes.dtypes:
            x = numbers((max(sizes.rows), length), dtype, device, 1) * 3
            weight = numbers((length,), dtype, device, 2)
            for kind in kinds:
                what = f"an RMS norm ({kind}) of {length} {_name(dtype)}"

                def compute(part: Tensor, weight: Tensor = weight, kind: NormKind = kind) -> Tensor:
                    return operations.rms_norm(part, weight, 1e-6, kind)

                found = expect_independent_rows(what, compute, x, sizes.rows)
                scale = weight.double() + (1.0 if kind == "one plus weight" else 0.0)
                wide = x.double()
                right = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * scale
                expect_near(what, found, right, right.abs() * (5 * _STEP[dtype] + 2.0**-20) + 1e-7)


def silu_mul(operations: Operations, device: torch.device, sizes: Sizes) -> None:
    """Try the activation, also far from zero."""
    for length in sizes.row:
        for dtype in sizes.dtypes:
            x = numbers((max(sizes.rows), 2 * length), dtype, device, 1) * 20
            what = f"silu(gate) * up of {length} {_name(dtype)}"
            found = expect_independent_rows(what, operations.silu_mul, x, sizes.rows)
            gate, up = x.double().chunk(2, dim=1)
            right = gate * torch.sigmoid(gate) * up
            expect_near(what, found, right, right.abs() * (5 * _STEP[dtype] + 2.0**-18) + 1e-6)


# -- the cache --------------------------------------------------------------------------------------------------------


def store(operations: Operations, device: torch.device, sizes: Sizes) -> None:
    """Try to store keys and values: slots out of order, padding rows, and rows that are not finite."""
    for dtype in sizes.dtypes:
        for dim in sizes.head_dims:
            for rows in sizes.rows:
                _store(operations, device, dtype, dim, rows)


def _store(operations: Operations, device: torch.device, dtype: torch.dtype, dim: int, rows: int) -> None:
    heads, padding, places = 2, 3, 2 * (rows + 3)
    key, value = (numbers((heads, rows + padding, size), dtype, device, size) for size in (dim, 2 * dim))
    bad = {rows // 3: float("inf"), rows // 2: float("nan")} if rows > 2 else {}
    for number, (row, wrong) in enumerate(bad.items()):
        (value if number else key)[number, row, dim // 2] = wrong
    slots = (torch.arange(rows + padding, device=device) * 2 + 1) % places  # odd places, none twice
    slots = slots.flip(0).contiguous()
    before = numbers((heads, places, dim), dtype, device, 7), numbers((heads, places, 2 * dim), dtype, device, 8)
    keys, values = before[0].clone(), before[1].clone()
    finite = torch.ones(rows + padding, dtype=torch.int32, device=device)
    operations.store(key, value, keys, values, slots, torch.tensor([rows], dtype=torch.int32, device=device), finite)
    right_finite = torch.ones_like(finite)
    for row in bad:
        right_finite[row] = 0
    what = f"storing {rows} rows of {dim} {_name(dtype)}"
    expect_same(f"{what}, which rows are finite", finite, right_finite)
    for found, old, new in ((keys, before[0], key), (values, before[1], value)):
        right = old.clone()
        right[:, slots[:rows]] = torch.where(right_finite[:rows, None] > 0, new[:, :rows], 0)
        expect_same(what, found, right)


def copy_blocks(operations: Operations, device: torch.device, sizes: Sizes) -> None:
    """Try to copy blocks: a chain, in which one copy reads what another wrote, and pairs behind the last."""
    pairs = ((0, 3), (3, 4), (2, 0), (4, 4), (0, 5), (1, 2))
    for dtype in sizes.dtypes:
        for count in (0, 1, 5):
            tensors = [numbers((2, 6 * BLOCK_SIZE, dim), dtype, device, dim) for dim in sizes.head_dims]
            right = [tensor.clone() for tensor in tensors]
            for source, target in pairs[:count]:
                for tensor in right:
                    here, there = (slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE) for block in (source, target))
                    tensor[:, there] = tensor[:, here].clone()
            table = torch.tensor(pairs, dtype=torch.int32, device=device)
            operations.copy_blocks(tensors, table, torch.tensor([count], dtype=torch.int32, device=device))
            for found, wanted in zip(tensors, right, strict=True):
                expect_same(f"copying {count} blocks of {_name(dtype)}", found, wanted)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

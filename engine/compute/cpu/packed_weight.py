"""Weights in the layout of the compiled kernels, and products with them. Knows pointers; no layer of a model."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.compute.cpu.kernel_calls import Calls, Format, GroupParts, Matrix
from engine.compute.whole.groups import Groups
from engine.compute.whole.rounding import GROUP, PER
from engine.errors import LoadError

KINDS: Final = {"float32": 0, "bfloat16": 1, "int8": 2, "grouped": 3}
"""How a packed weight is stored; the numbers of tiles.h."""

_PARTS: Final = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.uint8: 4, torch.int8: 5}
"""How a part of a weight in groups is stored; the numbers of grouped_layout.h."""

_CHUNK: Final = 256  # numbers that stand together with their scales: grouped_layout.h


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight `[columns, depth]` in the kernels' layout, and its bias.

    Attributes:
        kind: `float32`, `bfloat16` (of which no number was rounded), `int8` (in groups of 128), or `grouped`: whole
            numbers in groups.
        format: of `grouped`, with the numbers' bits.
    """

    data: Tensor
    bias: Tensor | None
    columns: int
    depth: int
    kind: str
    format: Format | None = None

    @property
    def input_kind(self) -> str:
        """What an input is rounded to: `float32`, `int8` or `grouped`. Weights of one product share it."""
        return "float32" if self.kind == "bfloat16" else self.kind

    @property
    def layout(self) -> str:
        """How the numbers are stored, in a word or a few: weights of one layout are computed by the same code."""
        if self.format is None:
            return self.kind
        return " ".join(str(getattr(self.format, name)) for name, *_ in Format._fields_)

    def matrix(self) -> Matrix:
        """Return the record that the kernels read; it points to this weight's memory."""
        bias = None if self.bias is None else self.bias.data_ptr()
        layout = None if self.format is None else ctypes.addressof(self.format)
        return Matrix(self.data.data_ptr(), bias, self.columns, layout, KINDS[self.kind])


Columns = Callable[[int, int], Tensor]
"""Reads the columns `start … end - 1` of a weight: `[end - start, depth]`, of any float dtype."""
Pieces = Sequence[tuple[int, int]]
"""All columns of a weight in order: the first of a piece, and the one after its last."""

Keep = Callable[[str, Callable[[], PackedWeight]], PackedWeight]
"""Returns the weight that is kept under a name, else the one that the function makes, which is then kept."""


def make_each(name: str, make: Callable[[], PackedWeight]) -> PackedWeight:
    """Keep nothing: a `Keep` that makes each weight."""
    return make()


def pack_weight(calls: Calls, weight: Tensor, bias: Tensor | None, kind: str) -> PackedWeight:
    """Bring `weight [columns, depth]` and `bias [columns]`, of any float dtype, into the kernels' layout.

    `exact` keeps every number: as bfloat16 if that loses nothing, else as float32. `int8` rounds, see kernels.c.
    """
    bias = _dense(bias)
    columns, depth = weight.shape
    packed = pack_pieces(calls, lambda start, end: weight[start:end], [(0, columns)], columns, depth, kind)
    return dataclasses.replace(packed, bias=bias)


def pack_pieces(calls: Calls, read: Columns, pieces: Pieces, columns: int, depth: int, kind: str) -> PackedWeight:
    """Pack a weight `[columns, depth]` of which only some columns are read at a time: see `pack_weight`.

    Args:
        pieces: all columns in order; each piece begins at a multiple of 64: whole panels lie before it.
    """
    for stored in ("bfloat16", "float32") if kind == "exact" else (kind,):
        number = KINDS[stored]
        data = _memory(calls.packed_bytes(columns, depth, number, None))
        for start, end in pieces:
            weight = read(start, end).detach().to(torch.float32).contiguous()
            out = data.data_ptr() + calls.packed_bytes(start, depth, number, None)
            if calls.pack(weight.data_ptr(), out, end - start, depth, number, torch.get_num_threads()):
                break  # it would have lost something
        else:
            return PackedWeight(data, None, columns, depth, stored)
    raise AssertionError("float32 holds every float32")


def pack_groups(calls: Calls, groups: Groups, bias: Tensor | None) -> PackedWeight:
    """Bring whole numbers in groups and `bias [columns]` into the kernels' layout; no number changes.

    Raises:
        ValueError: the groups are of a kind that the kernels do not have, or a number has more bits than they say.
    """
    layout = _format(groups)
    optional = (groups.scales, groups.supers, groups.minima, groups.minimum_supers)
    zeros = groups.zeros if isinstance(groups.zeros, Tensor) else None
    tensors = [None if part is None else part.detach().contiguous() for part in (groups.numbers, *optional, zeros)]
    parts = GroupParts(*(None if part is None else part.data_ptr() for part in tensors))
    columns, depth, address = groups.columns, groups.depth, ctypes.addressof(layout)
    data = _memory(calls.packed_bytes(columns, depth, KINDS["grouped"], address))
    if calls.pack_groups(address, ctypes.addressof(parts), data.data_ptr(), columns, depth, torch.get_num_threads()):
        raise ValueError(
            f"a number of a weight [{columns}, {depth}] has more than the {groups.bits} bits it should have"
        )
    return PackedWeight(data, _dense(bias), columns, depth, "grouped", layout)


def _format(groups: Groups) -> Format:
    """Check the groups, and describe them as the kernels do."""
    g, of = groups, -(-groups.depth // max(groups.group, 1))
    if g.bits not in (4, 5, 6, 8) or g.group not in (16, 32, 64, 128):
        raise ValueError(
            f"numbers of {g.bits} bits in groups of {g.group}; there are kernels for 4, 5, 6 and 8 bits"
            " in groups of 16, 32, 64 and 128"
        )
    span = g.group * g.per
    two_levels = g.supers is not None or g.minimum_supers is not None
    if g.per < 1 or (two_levels and _CHUNK % span and span % _CHUNK):
        raise ValueError(
            f"super-groups of {g.per} groups of {g.group} numbers neither divide {_CHUNK} nor are multiples"
        )
    floats, whole = (torch.float16, torch.bfloat16, torch.float32), (torch.uint8, torch.int8)
    shapes = {"groups": (g.columns, of), "super-groups": (g.columns, -(-of // max(g.per, 1)))}
    for name, part, dtypes, size in (
        ("numbers", g.numbers, (torch.uint8,), None),
        ("scales", g.scales, floats if g.supers is None else whole, "groups"),
        ("supers", g.supers, floats, "super-groups"),
        ("minima", g.minima, floats if g.minimum_supers is None else whole, "groups"),
        ("minimum_supers", g.minimum_supers, floats, "super-groups"),
        ("zeros", g.zeros if isinstance(g.zeros, Tensor) else None, (torch.uint8,), "groups"),
    ):
        if part is None:
            continue
        shape = tuple(part.shape) if size is None else shapes[size]
        if part.dtype not in dtypes or tuple(part.shape) != shape or part.device.type != "cpu":
            raise ValueError(
                f"{name} {list(part.shape)} {part.dtype} of a weight {list(g.numbers.shape)} in groups of"
                f" {g.group}: the kernels take {list(shape)} {' or '.join(map(str, dtypes))}"
            )
    if g.minima is None and g.minimum_supers is not None:
        raise ValueError("minimum_supers without minima")
    zero = g.zeros if isinstance(g.zeros, int) else 0
    if not 0 <= zero <= 255:
        raise ValueError(f"a zero of {zero}; the kernels take 0 to 255")
    kinds = (g.scales, g.supers, g.minima, g.minimum_supers, g.zeros if isinstance(g.zeros, Tensor) else None)
    return Format(g.bits, g.group, g.per, zero, *(0 if part is None else _PARTS[part.dtype] for part in kinds))


def round_pieces(calls: Calls, read: Columns, pieces: Pieces, columns: int, depth: int, bits: int) -> Groups:
    """Round a weight `[columns, depth]`, of which some columns are read at a time, to 4 or 6 bits, as `whole.rounding`.

    Raises:
        LoadError: a number is not finite.
    """
    groups = _unfilled(columns, depth, bits)
    parts = (groups.numbers, groups.scales, groups.minima, groups.supers, groups.minimum_supers)
    for start, end in pieces:
        weight = read(start, end).detach().to(torch.float32).contiguous()
        out = (None if part is None else part[start:end].data_ptr() for part in parts)
        if calls.round(weight.data_ptr(), *out, end - start, depth, bits, torch.get_num_threads()):
            raise LoadError("a weight is not a finite number, and cannot be rounded.")
    return groups


def _unfilled(columns: int, depth: int, bits: int) -> Groups:
    of = -(-depth // GROUP)

    def part(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(columns, count, dtype=dtype)

    numbers = part(depth, torch.uint8)
    whole, supers = (of, torch.uint8), (-(-of // PER), torch.bfloat16)
    if bits == 6:
        return Groups(numbers, 6, GROUP, part(*whole), part(*supers), zeros=32, per=PER)
    return Groups(numbers, 4, GROUP, part(*whole), part(*supers), part(*whole), part(*supers), 0, PER)


def widen(calls: Calls, packed: PackedWeight, columns: Tensor | None = None) -> Tensor:
    """Return the numbers that a packed weight stands for: `[columns, depth] float32`, or those of `columns [n] int64`.

    Raises:
        IndexError: there is no such column.
    """
    count = packed.columns
    if columns is not None:
        columns = columns.to(torch.int64).contiguous()
        count = columns.numel()
        if count and not 0 <= int(columns.min()) <= int(columns.max()) < packed.columns:
            raise IndexError(f"columns {int(columns.min())} to {int(columns.max())} of {packed.columns}")
    out, matrix = torch.empty(count, packed.depth, dtype=torch.float32), packed.matrix()
    chosen = None if columns is None else columns.data_ptr()
    calls.widen(ctypes.byref(matrix), chosen, out.data_ptr(), packed.depth, count, torch.get_num_threads())
    return out


class Product:
    """Computes `x @ weight.T + bias` for several weights at once: the input is read, and rounded if need be, once.

    Attributes:
        columns: of each weight; depth: theirs; address: of their table.
    """

    def __init__(self, calls: Calls, weights: Sequence[PackedWeight]) -> None:
        first = weights[0]
        if any((w.input_kind, w.depth) != (first.input_kind, first.depth) for w in weights):
            raise ValueError("weights of one product must have one depth, and take one kind of input")
        self.weights = tuple(weights)  # keeps the memory that the table points to
        self.columns = tuple(w.columns for w in weights)
        self.depth = first.depth
        self._call = calls.linear
        self._scratch = calls.scratch(self.depth, KINDS[first.kind])
        self._table = (Matrix * len(weights))(*(w.matrix() for w in weights))
        self.address = ctypes.addressof(self._table)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Multiply `x [rows, depth] float32` by each weight: `[rows, columns] float32`; rows are independent."""
        rows, x = x.shape[0], checked(x, self.depth)
        size = rows * sum(self.columns)
        # One allocation: results, then the kernel's scratch space.
        out = torch.empty(size + -(-rows * self._scratch // 4), dtype=torch.float32)
        start = out.data_ptr()
        self._call(
            x.data_ptr(),
            start + 4 * size,
            start,
            self.address,
            rows,
            self.depth,
            len(self.columns),
            torch.get_num_threads(),
        )
        parts, at = [], 0
        for columns in self.columns:
            parts.append(out[at : at + rows * columns].view(rows, columns))
            at += rows * columns
        return parts


def checked(x: Tensor, last: int) -> Tensor:
    """Return `x` dense; raise TypeError if the kernels would misread it: a pointer has no shape to check."""
    if x.dtype != torch.float32 or x.shape[-1] != last or x.device.type != "cpu":
        raise TypeError(f"the kernels take float32 [..., {last}] on a CPU, not {x.dtype} {list(x.shape)} on {x.device}")
    return x.contiguous()


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def _memory(size: int) -> Tensor:
    """Allocate `[size] uint8` in huge pages, where the system has them: weights are read from end to end."""
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)

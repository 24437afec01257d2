"""Choose the tile of a linear layer: from a table, by the GPU, the kind of weight, the columns and the number of rows.

A tile decides speed, never bits: a number is one chain along k whatever the tile's height, width, warps and stages.
What its bits may depend on, the block of k that a step of the chain takes (`block_k`), depends on nothing but the kind
of weight and the size of the input's numbers. So layers with the same input may be merged, too. Knows neither torch
nor triton.

Every tile fits 101,376 bytes of shared memory, what a block may have on sm_86, sm_89 and sm_120. The numbers come from
compiled kernels (registers, shared memory) and from an H100 (docs/log.md, "the first graphics card"); on the others
their speed has not been measured.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["Family", "Kind", "Tile", "digest", "family", "tile_for", "tiles_of"]

Family = Literal["ampere", "ada", "hopper", "blackwell", "blackwell rtx"]
"""sm_80 and sm_86; sm_89; sm_90; sm_100 and sm_103; sm_120 and sm_121."""
Kind = Literal["exact", "int8", "int4"]

BLOCK_K: Final = {("exact", 2): 128, ("exact", 4): 32, ("int8", 2): 128, ("int8", 4): 32}
"""Numbers along k in a step of a chain, by kind of weight and bytes of the input's numbers. For int4 it is a group."""

FEW, SOME = 16, 64
"""Rows of a tile, and up to which it is used; with more than `SOME` rows a prompt is among them."""
NARROW, MIDDLE, WIDE = 1_024, 8_192, 32_768
"""Up to how many columns a layer counts as narrow, middle or wide; beyond it is an output layer."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of a product that one program computes.

    Attributes:
        block_m: rows, block_n: columns, both at least 16; block_k: see `BLOCK_K`.
        warps: of a program; stages: of its pipeline of loads.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


_Shape = tuple[int, int, int, int]
"""block_m, block_n, warps, stages."""

# A column per class of columns: narrow, middle, wide, output layer. A line per class of rows: few, some, many.
_Table = tuple[tuple[_Shape, ...], ...]

_FLOAT: Final[_Table] = (
    ((16, 16, 4, 8), (16, 32, 4, 4), (16, 32, 4, 4), (16, 64, 4, 4)),
    ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
)
# Where products read both factors from shared memory (wgmma, tcgen05), every stage has a buffer, elsewhere one less.
_FLOAT_FROM_SHARED: Final[_Table] = (
    ((16, 16, 4, 8), (16, 16, 2, 6), (16, 64, 4, 4), (16, 16, 2, 6)),
    ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ((64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
)
_INT4: Final[_Table] = (  # widened numbers take registers: 64 columns of a 64-row tile spill with 4 warps
    ((16, 16, 4, 6), (16, 32, 4, 4), (16, 32, 4, 4), (16, 64, 4, 4)),
    ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
    ((64, 32, 4, 3), (64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
)
_INT4_FROM_SHARED: Final[_Table] = (
    _INT4[0],
    ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ((64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
)
_FLOAT32: Final[_Table] = (  # no matrix unit multiplies float32 without rounding it: registers hold both factors
    ((16, 16, 4, 6), (16, 32, 4, 4), (16, 32, 4, 4), (16, 32, 4, 4)),
    ((32, 32, 4, 3), (32, 32, 4, 3), (32, 32, 4, 3), (32, 32, 4, 3)),
    ((32, 32, 4, 3), (64, 64, 8, 3), (64, 64, 8, 3), (64, 64, 8, 3)),
)
_INT4_FLOAT32: Final[_Table] = (  # even the smallest spill: right, not fast
    ((16, 16, 4, 3),) * 4,
    ((16, 16, 4, 3),) * 4,
    ((32, 32, 8, 3),) * 4,
)

_OLD: Final[dict[tuple[Kind, int], _Table]] = {
    ("exact", 2): _FLOAT,
    ("int8", 2): _FLOAT,
    ("int4", 2): _INT4,
    ("exact", 4): _FLOAT32,
    ("int8", 4): _FLOAT32,
    ("int4", 4): _INT4_FLOAT32,
}
_FROM_SHARED: Final[dict[tuple[Kind, int], _Table]] = _OLD | {
    ("exact", 2): _FLOAT_FROM_SHARED,
    ("int8", 2): _FLOAT_FROM_SHARED,
    ("int4", 2): _INT4_FROM_SHARED,
}
TABLE: Final[dict[Family, dict[tuple[Kind, int], _Table]]] = {
    "ampere": _OLD,
    "ada": _OLD,
    "hopper": _FROM_SHARED,
    "blackwell": _FROM_SHARED,
    "blackwell rtx": _OLD,
}


def family(capability: tuple[int, int]) -> Family | None:
    """Name a GPU's family by its compute capability, such as (8, 9); None if the kernels are not made for it."""
    known: dict[int, Family] = {8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell rtx"}
    return "ada" if capability == (8, 9) else known.get(capability[0])


def tile_for(gpu: Family, kind: Kind, bytes_per_number: int, rows: int, columns: int, group: int) -> Tile:
    """Choose the tile of a product. Any shape has one.

    Args:
        kind: of the weight; bytes_per_number: of the input, 2 or 4.
        rows: of the input; columns: of the output; group: numbers that share a scale, for an int4 weight.
    """
    lines = TABLE[gpu][kind, bytes_per_number]
    line = lines[(rows > FEW) + (rows > SOME)]
    block_m, block_n, warps, stages = line[(columns > NARROW) + (columns > MIDDLE) + (columns > WIDE)]
    block_k = group if kind == "int4" else BLOCK_K[kind, bytes_per_number]
    return Tile(block_m, block_n, block_k, warps, stages)


def tiles_of(gpu: Family, kind: Kind, bytes_per_number: int, group: int) -> list[Tile]:
    """List every tile that may be chosen for such weights, each once."""
    every = (
        tile_for(gpu, kind, bytes_per_number, rows, columns, group)
        for rows in (FEW, SOME, SOME + 1)
        for columns in (NARROW, MIDDLE, WIDE, WIDE + 1)
    )
    return list(dict.fromkeys(every))


def digest() -> str:
    """Return a digest of the whole table: 16 hexadecimal digits, for the fingerprint."""
    whole = (TABLE, sorted(BLOCK_K.items()), FEW, SOME, NARROW, MIDDLE, WIDE)
    return hashlib.sha256(repr(whole).encode()).hexdigest()[:16]

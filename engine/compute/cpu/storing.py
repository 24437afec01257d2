"""Pack a weight while it is read, some columns at a time: it is never held whole in float32. Knows no file or model."""

from __future__ import annotations

from typing import Final

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import Columns, PackedWeight

__all__ = ["KINDS", "packed_kind", "store"]

KINDS: Final = ("exact", "int8", "4 bits", "6 bits")
"""How a weight may be stored: as it is; rounded as `quantization: int8` is; in groups (`whole.rounding`)."""
_PIECE: Final = 1 << 21
"""Numbers that are read at once: 8 MiB in float32."""
_PANEL: Final = 64
"""Columns that pieces are a multiple of: no panel of a packed weight has more."""


def packed_kind(quantization: str | None, *, table: bool) -> str:
    """Return the kind that an entry's `quantization` stores weights in. table: of the output layer or the embedding."""
    if quantization == "int4":
        return "6 bits" if table else "4 bits"
    return "int8" if quantization == "int8" else "exact"


def store(kernels: Kernels, kind: str, read: Columns, columns: int, depth: int) -> PackedWeight:
    """Pack a weight `[columns, depth]` without its bias. kind: one of `KINDS`.

    Raises:
        LoadError: a number that is to be rounded is not finite.
    """
    step = max(_PIECE // max(depth, 1) // _PANEL, 1) * _PANEL
    pieces = [(start, min(start + step, columns)) for start in range(0, columns, step)]
    if kind in ("exact", "int8"):
        return kernels.pack_pieces(read, pieces, columns, depth, kind)
    return kernels.pack_groups(kernels.round(read, pieces, columns, depth, int(kind[0])), None)

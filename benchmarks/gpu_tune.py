"""Time the tiles of the linear kernel on this card, and name the fastest for each line of the table of tiles.

The running table (engine/compute/cuda/tiles.py) is not changed: a table is part of the fingerprint, and a choice made
on one card on one day is a proposal. Every tile is compared bit by bit with the one in use before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.compute.cuda import tiles
from engine.compute.cuda.operations import LinearWeight

Multiply = Callable[[Tensor, LinearWeight, torch.dtype, tiles.Tile], Tensor]

_COLUMNS: dict[str, tuple[int, int]] = {
    "narrow": (1024, 2048),
    "middle": (4096, 4096),
    "wide": (24_576, 4096),
    "output layer": (151_936, 1024),
}
"""For each class of columns in the table the shape, `(out, in)`, that stands for it."""
_ROWS: dict[str, tuple[int, ...]] = {"few": (1, 8, 16), "some": (33, 64), "many": (128, 512)}
_SHAPES: dict[str, tuple[tuple[int, int, int, int], ...]] = {  # block_m, block_n, warps, stages
    "few": (
        *((16, 16, 2, 6), (16, 16, 4, 4), (16, 16, 4, 8), (16, 32, 2, 4), (16, 32, 4, 4), (16, 32, 4, 6)),
        *((16, 64, 4, 3), (16, 64, 4, 4), (16, 128, 4, 3)),
    ),
    "some": ((32, 32, 4, 3), (32, 64, 4, 4), (64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 8, 3)),
    "many": ((64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)),
}
_GROUP = 128
_LAUNCHES = 20
_BEYOND_CACHE = 2**28
"""Bytes of weights that are read in turn, so that none is in the card's cache, as in a model."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One tile on one shape.

    Attributes:
        seconds: by number of rows; empty where it failed. fault: why it failed; empty if it did not.
    """

    tile: tiles.Tile
    seconds: dict[int, float]
    fault: str = ""

    @property
    def total(self) -> float:
        return sum(self.seconds.values()) if not self.fault else float("inf")


def tune(device: torch.device, multiply: Multiply, family: tiles.Family, *, quick: bool = False) -> dict[str, Any]:
    """Time every candidate; return all times, and the table of the fastest in the order of the table in use.

    Args:
        multiply: computes a linear layer with a tile.
        quick: toy shapes, two candidates.
    """
    kinds: tuple[Literal["exact", "int8", "int4"], ...] = ("exact", "int8", "int4")
    table: dict[str, list[list[tuple[int, int, int, int]]]] = {}
    times: list[dict[str, Any]] = []
    for kind in kinds:
        lines = []
        for rows, counts in _ROWS.items():
            line = []
            for columns, shape in _COLUMNS.items():
                shape, counts = ((32, 256), counts[:1]) if quick else (shape, counts)
                used = tiles.tile_for(family, kind, 2, max(counts), _COLUMNS[columns][0], _GROUP)
                found = list(_timings(device, multiply, kind, shape, counts, _candidates(rows, used, quick)))
                best = min(found, key=lambda timing: timing.total)
                line.append((best.tile.block_m, best.tile.block_n, best.tile.warps, best.tile.stages))
                gain = found[0].total / best.total if best.total < float("inf") else 1.0
                where = {"kind": kind, "rows": rows, "columns": columns, "shape": shape, "gain": round(gain, 3)}
                times.append({**where, "timings": [asdict(timing) for timing in found]})
            lines.append(line)
        table[kind] = lines
    return {"family": family, "table": table, "times": times}


def _candidates(rows: str, used: tiles.Tile, quick: bool) -> list[tiles.Tile]:
    """The tile in use first, then the others."""
    others = [tiles.Tile(m, n, used.block_k, warps, stages) for m, n, warps, stages in _SHAPES[rows]]
    found = list(dict.fromkeys([used, *others]))
    return found[:2] if quick else found


def _timings(
    device: torch.device,
    multiply: Multiply,
    kind: Literal["exact", "int8", "int4"],
    shape: tuple[int, int],
    counts: tuple[int, ...],
    candidates: list[tiles.Tile],
) -> Iterator[Timing]:
    first = _weight(kind, shape, device)
    copies = min(max(1, _BEYOND_CACHE // first.data.nbytes), _LAUNCHES) if device.type == "cuda" else 1
    weights = [first, *(_weight(kind, shape, device) for _ in range(copies - 1))]
    generator = torch.Generator(device).manual_seed(7)
    x = torch.randn(max(counts), shape[1], generator=generator, device=device).to(torch.bfloat16)
    right: Tensor | None = None
    for tile in candidates:
        seconds: dict[int, float] = {}
        try:
            found = multiply(x, first, torch.bfloat16, tile)
            right = found if right is None else right
            if not torch.equal(found, right):
                yield Timing(tile, {}, "other bits than the tile in use")
                continue
            for count in counts:

                def launch(i: int, part: Tensor = x[:count], tile: tiles.Tile = tile) -> Tensor:
                    return multiply(part, weights[i % copies], torch.bfloat16, tile)

                seconds[count] = _time(device, launch)
        except Exception as error:  # too much shared memory, or a tile that does not compile
            yield Timing(tile, {}, f"{type(error).__name__}: {error}"[:200])
        else:
            yield Timing(tile, seconds)


def _weight(kind: Literal["exact", "int8", "int4"], shape: tuple[int, int], device: torch.device) -> LinearWeight:
    out, depth = shape
    generator = torch.Generator(device).manual_seed(out)
    if kind == "exact":
        return LinearWeight(torch.randn(out, depth, generator=generator, device=device).to(torch.bfloat16))
    if kind == "int8":
        data = torch.randint(-127, 128, shape, generator=generator, device=device, dtype=torch.int8)
        return LinearWeight(data, "int8", torch.ones(out, device=device) / 127)
    data = torch.randint(0, 256, (out, depth // 2), generator=generator, device=device, dtype=torch.uint8)
    return LinearWeight(data, "int4", torch.ones(out, depth // _GROUP, device=device) / 8)


def _time(device: torch.device, launch: Callable[[int], object]) -> float:
    """Seconds of one launch: on a card from a CUDA graph of twenty, the best of five."""
    if device.type != "cuda":
        start = time.perf_counter()
        launch(0)
        return time.perf_counter() - start
    for i in range(_LAUNCHES):
        launch(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(_LAUNCHES):
            launch(i)
    best = float("inf")
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000 / _LAUNCHES)
    return best

"""The table of tiles: something for every shape, and nothing in it that bits may depend on but the kind of weight."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given, strategies as st

from engine.compute.cuda import tiles
from engine.compute.cuda.tiles import Family, Kind, digest, family, tile_for, tiles_of

KINDS = st.sampled_from(get_args(Kind))
FAMILIES = st.sampled_from(get_args(Family))
SIZES = st.sampled_from([2, 4])
GROUPS = st.sampled_from([32, 64, 128])
ANY = st.integers(1, 1 << 20)


@given(FAMILIES, KINDS, SIZES, ANY, ANY, GROUPS)
def test_every_shape_has_a_tile(gpu: Family, kind: Kind, size: int, rows: int, columns: int, group: int) -> None:
    """One that Triton can compute: powers of two of at least 16, and no fewer rows than are left masked for nothing."""
    tile = tile_for(gpu, kind, size, rows, columns, group)
    for block in (tile.block_m, tile.block_n, tile.block_k):
        assert block >= 16
        assert block & (block - 1) == 0
    assert rows > 16 or tile.block_m == 16
    assert tile in tiles_of(gpu, kind, size, group)


@given(FAMILIES, FAMILIES, KINDS, SIZES, st.tuples(ANY, ANY), st.tuples(ANY, ANY), GROUPS)
def test_the_chain_depends_on_the_kind_of_weight_alone(
    one: Family, two: Family, kind: Kind, size: int, shape: tuple[int, int], other: tuple[int, int], group: int
) -> None:
    """Neither on rows and columns, so that layers may be merged, nor on the GPU."""
    assert tile_for(one, kind, size, *shape, group).block_k == tile_for(two, kind, size, *other, group).block_k


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), None),
        ((8, 0), "ampere"),
        ((8, 6), "ampere"),
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((12, 0), "blackwell rtx"),
        ((13, 0), None),
    ],
)
def test_a_gpu_belongs_to_a_family(capability: tuple[int, int], name: str | None) -> None:
    assert family(capability) == name


def test_the_digest_sees_every_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint names the table: a changed tile, block or border is another digest."""
    seen = {digest()}
    table = {**tiles.TABLE, "ada": {**tiles.TABLE["ada"], ("int4", 4): tiles.TABLE["ada"]["exact", 2]}}
    for name, value in (("TABLE", table), ("BLOCK_K", {**tiles.BLOCK_K, ("int8", 2): 64}), ("NARROW", 1_025)):
        with monkeypatch.context() as patch:
            patch.setattr(tiles, name, value)
            seen.add(digest())
    assert len(seen) == 4
    assert digest() in seen


def test_the_table_can_be_read_without_torch() -> None:
    """Probes and fingerprints read it before a GPU is touched."""
    code = "import sys, engine.compute.cuda.tiles; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

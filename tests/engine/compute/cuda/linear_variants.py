"""The variants of the linear kernel that the table of tiles asks for, to be compiled by `compiling`."""

from __future__ import annotations

from collections.abc import Iterator

from compiling import Variant

from engine.compute.cuda import tiles

STORED = {"int8": "*i8", "int4": "*u8"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
FAMILIES: dict[int, tiles.Family] = {80: "ampere", 86: "ampere", 89: "ada", 90: "hopper", 120: "blackwell rtx"}


def named(kind: tiles.Kind, number: str, group: int, tile: tiles.Tile, zeros: bool = False) -> str:
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.warps} {tile.stages}"
    return f"{kind}{group if kind == 'int4' else ''}{' zeros' if zeros else ''} {number} {shape}"


def cases() -> Iterator[tuple[tiles.Family, str, tiles.Kind, str, int, tiles.Tile, bool]]:
    """Yield every entry of the table: family, name of the variant, and what it consists of."""
    for family in tiles.TABLE:
        for number, size in SIZES.items():
            for kind in ("exact", "int8", "int4"):
                for group in (32, 64, 128) if kind == "int4" else (0,):
                    for zeros in (False, True) if kind == "int4" else (False,):
                        for tile in tiles.tiles_of(family, kind, size, group):
                            yield family, named(kind, number, group, tile, zeros), kind, number, group, tile, zeros


def variants() -> Iterator[Variant]:
    from engine.compute.cuda.kernels.linear import linear_kernel

    seen = set()
    for _, name, kind, number, group, tile, zeros in cases():
        if name in seen:
            continue
        seen.add(name)
        yield Variant(
            name,
            linear_kernel,
            signature={
                "x": f"*{number}",
                "weight": STORED.get(kind, f"*{number}"),
                "scale": "*fp32",
                "zeros": "*u8",
                "bias": f"*{number}",
                "y": f"*{number}",
                "m": "i32",
                "n": "i32",
                "k": "i32",
                "stride_weight": "i32",
                "stride_x": "i32",
            },
            constants={
                "KIND": kind,
                "GROUP": group,
                "HAS_ZEROS": zeros,
                "HAS_BIAS": True,
                "WHOLE_K": True,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
            },
            warps=tile.warps,
            stages=tile.stages,
            divisible=("n", "k", "stride_weight", "stride_x"),
        )

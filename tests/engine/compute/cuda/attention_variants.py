"""Variants of the attention and row kernels for `compiling`: as `attend` and its neighbours launch them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from compiling import Variant

from engine.compute.attention_mask import ALL_BEFORE, KeyRange
from engine.compute.backend import AttentionSettings
from engine.compute.cuda.kernels import attention, rows
from engine.compute.cuda.steps.tables import MERGE
from engine.compute.kv_cache import LayerShape

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTER, NUMBER = "*fp32", "i32"
WINDOW, CHUNK = KeyRange(window=4096), KeyRange(chunk=8192)


def items(
    group: int,
    key_dim: int,
    dtype: torch.dtype,
    item_rows: int,
    seen: KeyRange = ALL_BEFORE,
    softcap: float | None = None,
    *,
    value_dim: int | None = None,
    sinks: bool = False,
) -> Variant:
    """`attend_items` for layers of eight key heads; arguments as in `LayerShape` and `AttentionSettings`."""
    shape = LayerShape(8, key_dim, value_dim or key_dim, dtype, torch.device("cpu"), seen)
    settings = AttentionSettings(8 * group, 1.0, softcap, torch.zeros(8 * group) if sinks else None)
    chosen = attention.item_tile(item_rows, shape, settings)
    numbers = f"*{NAMES[dtype]}"
    signature = dict.fromkeys(("query", "keys", "values", "out"), numbers)
    signature |= dict.fromkeys(("sums_out", "peaks_out", "totals_out"), POINTER)
    signature |= dict.fromkeys(("items", "counts", "all_blocks"), "*i32")
    signature |= {"sinks": numbers if sinks else POINTER, "scale": "fp32", "softcap": "fp32"}
    strides = ("query_row", "query_head", "key_head", "value_head")
    signature |= dict.fromkeys(("window", "chunk", *strides), NUMBER)
    kind = "narrow" if item_rows == attention.NARROW else "wide"
    name = f"{kind} {NAMES[dtype]} {group}x{key_dim}" + f"/{value_dim}" * (value_dim is not None)
    name += f" {seen.describe()}" * (seen != ALL_BEFORE) + " softcap" * bool(softcap) + " sinks" * sinks
    return Variant(
        name.replace(" of ", " "),
        attention.attend_items,
        signature,
        {"COUNT": int(kind == "wide"), **attention.constants(shape, settings, item_rows, chosen)},
        chosen.warps,
        chosen.stages,
        strides,
    )


def simple(name: str, kernel: Any, types: str, constants: dict[str, Any], warps: int = 4) -> Variant:
    """A kernel without matrix products: `types` names those of its arguments that are no constants, in order."""
    arguments = [n for n in kernel.arg_names if n not in constants]
    return Variant(name, kernel, dict(zip(arguments, types.split(), strict=True)), constants, warps, 3)


def others() -> Iterator[Variant]:
    merge = {"HEADS": 32, "VALUE_DIM": 128, "VALUE_PAD": 128, "MERGE": MERGE, "SINKS": False}
    types = "*fp32 *fp32 *fp32 *bf16 *i32 *i32 *fp32"
    yield simple("merge", attention.merge_partials, types, merge, 1)
    norm = {"INNER": 1, "PAD": 4096, "ADD_ONE": False}
    yield simple("norm", rows._rms_norm, "*bf16 *bf16 *bf16 i32 fp32 fp32 i32 i32", norm, 8)
    yield simple("silu", rows._silu_mul, "*bf16 *bf16 i32 i32", {"PAD": 1024})
    store = {"HEADS": 8, "STEP": 8, "KEY_DIM": 128, "VALUE_DIM": 128, "KEY_PAD": 128, "VALUE_PAD": 128}
    types = "*bf16 *bf16 *bf16 *bf16 *i64 *i32 *i32" + 6 * " i32"
    yield simple("store", rows._store, types, store)
    yield simple("copy", rows._copy_blocks, "*i64 *i32 *i32", {"WORDS": 1024})


USUAL = ("narrow bf16 4x128", "wide bf16 4x128", "merge", "norm", "silu", "store", "copy")
"""Names of those that are compiled in every run of the tests."""


def variants() -> Iterator[Variant]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for item_rows in (attention.NARROW, attention.WIDE):
        yield items(4, 128, bf16, item_rows)
        yield items(1, 64, fp16, item_rows)
        yield items(7, 64, bf16, item_rows, WINDOW, sinks=True)
        yield items(3, 80, bf16, item_rows, CHUNK)
        yield items(8, 96, fp16, item_rows, WINDOW, 50.0, sinks=True)
        yield items(2, 256, bf16, item_rows, WINDOW, 50.0)
        yield items(8, 256, fp16, item_rows, CHUNK, sinks=True)
        yield items(16, 192, bf16, item_rows, value_dim=128)
        yield items(2, 512, bf16, item_rows)
        yield items(71, 64, bf16, item_rows)
        yield items(2, 64, fp32, item_rows, WINDOW, 50.0)
        yield items(4, 128, fp32, item_rows)
        yield items(4, 256, fp32, item_rows, WINDOW, sinks=True)
    yield from others()

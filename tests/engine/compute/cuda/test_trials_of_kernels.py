"""The kernels pass the trials that a GPU gives them at first contact; here they are interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the kernels of the CUDA path are written in Triton")

import interpreter

from engine.compute.attention_mask import KeyRange
from engine.compute.backend import AttentionSettings
from engine.compute.cuda import tiles
from engine.compute.cuda.kernels.first import add_one
from engine.compute.cuda.kernels.linear import linear
from engine.compute.cuda.operations import LinearWeight, Operations
from engine.compute.cuda.triton_operations import TritonOperations
from engine.compute.kv_cache import LayerShape
from engine.loading.gpu import kernel_trials
from engine.loading.gpu.attention_steps import StepTrial

interpreter.install()

CPU = torch.device("cpu")
TINY = replace(
    kernel_trials.SMALL,
    dtypes=(torch.bfloat16,),
    rows=(1, 2, 16, 17),
    row=(32,),
    linear=((24, 128), (20, 96)),
    keys=280,
)
TRIALS: dict[str, Callable[[Operations, torch.device, kernel_trials.Sizes], None]] = {
    "linear": partial(kernel_trials.linear, kind="exact"),
    "int8": partial(kernel_trials.linear, kind="int8"),
    "int4": partial(kernel_trials.linear, kind="int4"),
    "rms_norm": kernel_trials.rms_norm,
    "silu_mul": kernel_trials.silu_mul,
    "store": kernel_trials.store,
    "copy_blocks": kernel_trials.copy_blocks,
}


@pytest.mark.parametrize("name", TRIALS)
def test_kernels_pass(name: str) -> None:
    TRIALS[name](TritonOperations(), CPU, TINY)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [KeyRange(), KeyRange(window=100)], ids=["all keys", "a window"])
def test_attention_passes(seen: KeyRange) -> None:
    shape = LayerShape(2, 16, 16, torch.bfloat16, CPU, seen)
    StepTrial(TritonOperations(), shape, AttentionSettings(4, 0.25), TINY).run()


def test_the_first_kernel_adds_one() -> None:
    assert add_one(torch.arange(200.0)).tolist() == [i + 1.0 for i in range(200)]


def test_every_tile_of_the_table_has_the_same_bits() -> None:
    def few(x: torch.Tensor, weight: LinearWeight, out_dtype: torch.dtype):  # type: ignore[no-untyped-def]
        for tile in tiles.tiles_of("hopper", weight.kind, x.element_size(), weight.group)[::4]:
            yield str(tile), linear(x, weight, out_dtype, tile)

    kernel_trials.linear(TritonOperations(), CPU, replace(TINY, linear=((24, 128),), rows=(1, 17)), "exact", few)

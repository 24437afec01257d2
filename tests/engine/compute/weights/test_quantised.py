"""Layers that others have quantised, in groups for a CPU: each number is what the format's own formula gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from engine.compute.whole import quantised
from engine.compute.whole.quantised import Quantised, groups_of
from engine.errors import LoadError
from tests.engine.compute.cuda.foreign_layers import Layer, random

SEEDS = st.integers(0, 1 << 30)


def widened(layer: Quantised) -> Tensor:
    """Return what the groups of a layer stand for, its columns in the order of the inputs."""
    wide = groups_of(layer).widened()
    if layer.order is None:
        return wide
    out = torch.empty_like(wide)
    out[:, layer.order] = wide
    return out


def check(found: Quantised, layer: Layer, meant: Tensor | None = None) -> None:
    assert torch.equal(widened(found).double(), layer.numbers() if meant is None else meant)
    assert found.bias is not None
    assert torch.equal(found.bias, layer.bias)
    groups = groups_of(found)
    assert groups.group in (16, 32, 64, 128)
    assert groups.scales.shape == (groups.columns, -(-groups.depth // groups.group))
    assert isinstance(groups.zeros, int) == bool((layer.zero == 1 << (layer.bits - 1)).all())


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([16, 32, 48, 64, 96, 128, 384]), st.booleans(), st.sampled_from([4, 8]))
def test_every_format_is_read_exactly(seed: int, size: int, symmetric: bool, bits: int) -> None:
    layer = Layer(seed, 16, 384, size, bits=bits, symmetric=symmetric)
    forms = [layer.gptq(1), layer.gptq(2), layer.compressed(symmetric), *([layer.awq()] if bits == 4 else [])]
    for tensors, form in forms:
        check(quantised.read(tensors, form), layer)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([32, 64, 128]))
def test_act_order_is_undone_by_sorting_the_inputs(seed: int, size: int) -> None:
    """GPTQ: `scales[g_idx] · (q - zeros[g_idx])`, with groups whose columns are scattered."""
    layer = Layer(seed, 8, 256, size)
    tensors, form = layer.gptq(1)
    g_idx = tensors["g_idx"][torch.randperm(256, generator=random(seed))]
    place = g_idx.long()
    meant = (layer.q - layer.zero[:, place]).double() * layer.scale[:, place].double()
    found = quantised.read({**tensors, "g_idx": g_idx}, {**form, "desc_act": True})
    assert found.order is not None
    check(found, layer, meant)
    tensors, form = layer.compressed(symmetric=False)
    check(quantised.read({**tensors, "weight_g_idx": g_idx}, form), layer, meant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_float(dtype: torch.dtype) -> None:
    layer = Layer(1, 8, 128, 32)
    layer.scale = layer.scale.to(dtype)
    found = quantised.read(*layer.gptq())
    assert groups_of(found).scales.dtype == dtype
    check(found, layer)


def test_one_scale_for_all_columns_and_depths_that_fill_no_group() -> None:
    layer = Layer(0, 8, 264, 264)
    tensors, form = layer.gptq()
    check(quantised.read(tensors, {**form, "group_size": -1}), layer)
    check(quantised.read(*layer.compressed(symmetric=False)), layer)


def test_whole_numbers_of_a_byte_each() -> None:
    """compressed-tensors' int-quantized, weights only: a scale for each output, or for each group."""
    for size in (96, 32):
        layer = Layer(0, 8, 96, size, bits=8)
        tensors, form = layer.compressed(symmetric=False)
        tensors |= {"weight": (layer.q - 128).to(torch.int8), "weight_zero_point": (layer.zero - 128).to(torch.int8)}
        del tensors["weight_packed"], tensors["weight_shape"]
        check(quantised.read(tensors, {**form, "format": "int-quantized"}), layer)


def test_what_is_not_understood_is_refused() -> None:
    layer = Layer(0, 8, 256, 64)
    tensors, form = layer.gptq()
    uneven = tensors["g_idx"].clone()
    uneven[0] = 3
    with pytest.raises(LoadError, match="no groups of 64"):
        quantised.read({**tensors, "g_idx": uneven}, form)
    with pytest.raises(LoadError, match="not a finite number"):
        quantised.read({**tensors, "scales": tensors["scales"] * float("inf")}, form)
    odd = Layer(0, 8, 240, 24)
    with pytest.raises(LoadError, match="groups of 24 columns"):
        groups_of(quantised.read(*odd.gptq()))
    tensors, form = layer.compressed(symmetric=True)
    form["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(LoadError, match="activations"):
        quantised.check(form)

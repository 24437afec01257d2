"""Layers that others have quantised, in groups for a CPU: each number is what the format's own formula gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    _weights(form)["actorder"] = "group"
    check(quantised.read({**tensors, "weight_g_idx": g_idx}, form), layer, meant)
    with pytest.raises(LoadError, match="weight_g_idx of a quantised layer is missing"):
        quantised.read(tensors, form)


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


def _weights(form: dict[str, Any]) -> dict[str, Any]:
    """How the weights of all layers are quantised, in settings of compressed-tensors."""
    found: dict[str, Any] = form["config_groups"]["group_0"]["weights"]
    return found


def test_one_scale_and_one_zero_for_all_numbers() -> None:
    layer = Layer(0, 8, 96, 96, bits=8)
    layer.scale[:], layer.zero[:] = layer.scale[0].clone(), layer.zero[0].clone()
    tensors, form = layer.compressed(symmetric=False)
    tensors |= {"weight": (layer.q - 128).to(torch.int8), "weight_scale": layer.scale[0].reshape(1)}
    tensors["weight_zero_point"] = (layer.zero[0] - 128).to(torch.int8).reshape(1)
    _weights(form).update(strategy="tensor", group_size=None)
    check(quantised.read(tensors, {**form, "format": "int-quantized"}), layer)
    del _weights(form)["strategy"]
    check(quantised.read(tensors, {**form, "format": "int-quantized"}), layer)


COMPRESSED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "no zeros": (lambda form, tensors: tensors.pop("weight_zero_point"), "weight_zero_point of .* is missing"),
    "zeros that are floats": (
        lambda form, tensors: tensors.update(weight_zero_point=torch.ones(8, 4)),
        "weight_zero_point of .* torch.float32",
    ),
    "scales of blocks": (
        lambda form, tensors: (
            _weights(form).update(strategy="block", block_structure=[2, 32]),
            tensors.update(weight_scale=torch.ones(4, 8).half()),
        ),
        "strategy block",
    ),
    "scales that stand the other way": (
        lambda form, tensors: tensors.update(weight_scale=tensors["weight_scale"].t()),
        r"weight_scale of \[4, 8\]",
    ),
    "one scale of many": (
        lambda form, tensors: tensors.update(weight_scale=torch.ones(1).half()),
        r"weight_scale of \[1\]",
    ),
    "words of other bits": (
        lambda form, tensors: tensors.update(weight_packed=tensors["weight_packed"].repeat(1, 2)),
        r"weight_packed of \[8, 64\] is no weight of \[8, 256\] with 4 bits",
    ),
    "a cache that is rounded": (
        lambda form, tensors: form.update(kv_cache_scheme={"num_bits": 8, "type": "float"}),
        "kv_cache_scheme",
    ),
    "inputs that are rotated": (
        lambda form, tensors: form.update(transform_config={"config_groups": {"r1": {"type": "hadamard"}}}),
        "transform_config",
    ),
    "numbers that are left out": (
        lambda form, tensors: form.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config",
    ),
    "results that are rounded": (
        lambda form, tensors: form["config_groups"]["group_0"].update(output_activations={"num_bits": 8}),
        "output_activations",
    ),
    "names of schemes": (lambda form, tensors: form.update(config_groups={"W4A16": ["Linear"]}), "only names"),
    "a list of schemes": (lambda form, tensors: form.update(config_groups=[]), "config_groups"),
    "a group_size in words": (lambda form, tensors: _weights(form).update(group_size="64"), "group_size of '64'"),
    "groups that are no whole numbers": (
        lambda form, tensors: tensors.update(weight_g_idx=(torch.arange(256) // 64).double()),
        "g_idx of torch.float64",
    ),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_what_compressed_tensors_says_and_nothing_here_does_is_refused(case: str) -> None:
    """Each of these files would be read, and as other numbers, if its settings were passed over."""
    tensors, form = Layer(0, 8, 256, 64).compressed(symmetric=False)
    change, words = COMPRESSED[case]
    change(form, tensors)
    with pytest.raises(LoadError, match=words):
        quantised.read(tensors, form)


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

"""Weights for the linear kernel: rounding, packing, and the formats of other quantisers, read number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from engine.compute.cuda import weights
from engine.compute.cuda.operations import LinearWeight
from engine.compute.cuda.weights import from_checkpoint, widened
from engine.errors import LoadError
from tests.engine.compute.cuda.foreign_layers import Layer, random

SEEDS = st.integers(0, 1 << 30)
GROUPS = st.sampled_from([32, 64, 128])


# -- our own rounding --------------------------------------------------------------------------------------------------


@given(SEEDS, GROUPS, st.integers(1, 5), st.integers(1, 3))
def test_int4_keeps_what_four_bits_can_hold(seed: int, group: int, rows: int, groups: int) -> None:
    """Numbers that are whole multiples of a scale come back exactly; every row, group and column in its place."""
    whole = torch.randint(-8, 8, (rows, groups, group), generator=random(seed)).float()
    whole[:, :, 3] = -8
    scale = torch.rand(rows, groups, 1, generator=random(seed + 1)).half().float() + 0.25
    weight = (whole * scale).reshape(rows, -1)
    packed = weights.int4(weight, None, group)
    assert packed.data.shape == (rows, groups * group // 2)
    assert (packed.in_features, packed.out_features, packed.group) == (groups * group, rows, group)
    assert torch.equal(widened(packed), weight)


def test_the_layout_of_int4_is_as_documented() -> None:
    """Byte j of a group: column j in the low bits, column group / 2 + j in the high ones."""
    whole = (torch.arange(64) % 16 - 8).float()
    whole[32:] = -8
    packed = weights.int4(whole[None], None, 32)
    low = [j % 16 | (16 + j) % 16 << 4 for j in range(16)]
    assert packed.data[0, :16].tolist() == low
    assert packed.data[0, 16:].tolist() == [0] * 16


@given(SEEDS, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_rounding_is_to_the_nearest(seed: int, dtype: torch.dtype) -> None:
    """Off by half a step at most; int4 has no +8, so that a number there may be a whole step off."""
    weight = torch.randn(6, 128, generator=random(seed)).to(dtype)
    for packed, step in ((weights.int8(weight, None), 0.5), (weights.int4(weight, None), 0.5)):
        assert packed.scale is not None
        scale = packed.scale.abs().reshape(6, 1)
        off = (widened(packed) - weight.float()).abs() / scale
        top = weight.float() / packed.scale.reshape(6, 1) > 7.5
        allowed = torch.where(top, 1.0, step) if packed.kind == "int4" else torch.full_like(off, step)
        assert (off <= allowed + 1e-4).all()
    assert weights.int8(weight, None).data.to(torch.int32).abs().amax(dim=1).tolist() == [127] * 6


def test_ties_go_to_the_even_number() -> None:
    row = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert weights.int8(row[None], None).data[0].tolist() == [127, 0, 2, 2, 0, -2]
    row = torch.zeros(32)
    row[:5] = torch.tensor([-8.0, 0.5, 1.5, 2.5, -0.5])
    assert widened(weights.int4(row[None], None, 32))[0, :5].tolist() == [-8, 0, 2, 2, 0]


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 3e38])
def test_rows_of_zeros_and_extreme_numbers_are_safe(largest: float) -> None:
    """A scale of zero would make not-a-numbers of them."""
    row = torch.zeros(1, 128)
    row[0, 5] = largest
    for packed in (weights.int8(row, None), weights.int4(row, None)):
        assert widened(packed).isfinite().all()
        assert torch.allclose(widened(packed), row, rtol=1e-5, atol=1e-44)


def test_int4_refuses_columns_that_fill_no_group() -> None:
    for columns, group in ((100, 128), (192, 128), (96, 48)):
        with pytest.raises(LoadError, match=rf"{columns} columns in groups of {group}"):
            weights.int4(torch.zeros(2, columns), None, group)


def test_merged_weights_are_the_parts_in_their_order() -> None:
    """With biases, scales and zero points; unlike ones are not merged."""
    plain = [torch.randn(n, 128, generator=random(n)) for n in (3, 1, 4)]
    bias = [torch.randn(n) for n in (3, 1, 4)]
    for make in (weights.exact, weights.int8, weights.int4):
        parts = [make(w, b) for w, b in zip(plain, bias, strict=True)]
        merged = weights.concatenated(parts)
        assert torch.equal(widened(merged), torch.cat([widened(p) for p in parts]))
        assert merged.bias is not None
        assert torch.equal(merged.bias, torch.cat(bias))
        unlike = [make(plain[1], None), make(torch.randn(2, 256), bias[1]), weights.exact(plain[1].half(), bias[1])]
        for other in unlike:
            assert not weights.mergeable([parts[0], other])
    assert not weights.mergeable([weights.int4(plain[0], None, 64), weights.int4(plain[1], None, 128)])


# -- other quantisers' formats ----------------------------------------------------------------------------------------


def check(layer: Layer, weight: LinearWeight) -> None:
    """The same numbers, all of them exactly, in a layout that the kernel reads."""
    assert torch.equal(widened(weight).double(), layer.numbers())
    assert weight.bias is not None
    assert torch.equal(weight.bias, layer.bias)
    assert weight.data.is_contiguous()
    if weight.kind == "int4":
        assert weight.group in (32, 64, 128)
        assert (weight.zeros is None) == bool((layer.zero == 8).all())


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([32, 64, 96, 128, 384]), st.booleans())
def test_four_bits_of_every_format_are_read_exactly(seed: int, size: int, symmetric: bool) -> None:
    """Each format's own formula gives these numbers; a group larger than ours becomes several with one scale."""
    layer = Layer(seed, 16, 384, size, symmetric=symmetric)
    for tensors, form in (layer.gptq(1), layer.gptq(2), layer.awq(), layer.compressed(symmetric)):
        check(layer, from_checkpoint(tensors, form))


def test_one_scale_for_all_columns() -> None:
    """`group_size: -1`, and the strategy `channel`."""
    layer = Layer(0, 8, 256, 256)
    tensors, form = layer.gptq()
    check(layer, from_checkpoint(tensors, {**form, "group_size": -1}))
    check(layer, from_checkpoint(*layer.compressed(symmetric=False)))


def test_eight_bits_with_a_scale_for_each_output_are_read() -> None:
    """GPTQ and compressed-tensors, symmetric, -128 included."""
    layer = Layer(0, 8, 64, 64, bits=8, symmetric=True)
    layer.q[0, 0] = 0
    for tensors, form in (layer.gptq(1), layer.gptq(2), layer.compressed(symmetric=True)):
        weight = from_checkpoint(tensors, {**form, "group_size": -1})
        assert weight.kind == "int8"
        check(layer, weight)


def test_columns_that_fill_no_word_and_zeros_of_a_byte_each() -> None:
    """compressed-tensors fills the last word up, along either side; older releases store zeros unpacked, around 0."""
    layer = Layer(0, 13, 64, 32)
    tensors, form = layer.compressed(symmetric=False)
    assert tensors["weight_zero_point"].shape == (2, 2)
    check(layer, from_checkpoint(tensors, form))
    tensors["weight_zero_point"] = (layer.zero - 8).to(torch.int8)
    check(layer, from_checkpoint(tensors, form))
    narrow = Layer(0, 8, 66, 66, bits=8, symmetric=True)
    check(narrow, from_checkpoint(*narrow.compressed(symmetric=True)))


def test_a_known_word_of_each_format() -> None:
    """Words written down by hand, so that packer and reader cannot err together."""
    gptq = {
        "qweight": torch.tensor([[0x76543210]] * 4, dtype=torch.int32),
        "qzeros": torch.tensor([[0x77777777]], dtype=torch.int32),
        "scales": torch.ones(1, 1),
    }
    form = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    with pytest.raises(LoadError, match="do not fit"):
        from_checkpoint(gptq, form)  # a word holds the zeros of eight outputs; there is one
    gptq = {**gptq, "qweight": gptq["qweight"].expand(4, 8).contiguous(), "scales": torch.ones(1, 8)}
    assert widened(from_checkpoint(gptq, form))[0, :9].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1, -8]
    awq = {
        "qweight": torch.tensor([[0x75316420]] * 32, dtype=torch.int32),
        "qzeros": torch.tensor([[0]], dtype=torch.int32),
        "scales": torch.ones(1, 8),
    }
    read = from_checkpoint(awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"})
    assert widened(read)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def spoiled(method: str, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layer = Layer(0, 8, 256, changes.pop("size", 64), bits=changes.pop("stored", 4))
    tensors, form = {"gptq": layer.gptq, "awq": layer.awq, "compressed": lambda: layer.compressed(False)}[method]()
    for name in [name for name in changes if name in ("g_idx", "weight_g_idx", "qweight", "weight_shape")]:
        tensors[name] = changes.pop(name)
    for name in changes.pop("without", ()):
        del tensors[name]
    weights_changed = changes.pop("scheme", {})
    if method == "compressed":
        form["config_groups"]["group_0"] |= weights_changed
    return tensors, {**form, **changes}


@pytest.mark.parametrize(
    ("layer", "words_of_it"),
    [
        (spoiled("gptq", quant_method="hqq"), "hqq"),
        (spoiled("gptq", bits=3), "3 bits"),
        (spoiled("gptq", checkpoint_format="marlin"), "marlin"),
        (spoiled("gptq", dynamic={"+:.*": {"bits": 8}}), "dynamic"),
        (spoiled("gptq", g_idx=torch.arange(256).flip(0) // 64), "desc_act"),
        (spoiled("gptq", desc_act=True, without=["g_idx"]), "desc_act"),
        (spoiled("gptq", without=["qzeros"]), "qzeros"),
        (spoiled("gptq", group_size=48), "groups of 48"),
        (spoiled("awq", group_size=128), "4 groups of 128"),
        (spoiled("gptq", size=16), "groups of 16"),
        (spoiled("gptq", qweight=torch.zeros(32, 8, dtype=torch.int64)), "int64"),
        (spoiled("gptq", stored=8), "8 bits"),
        (spoiled("awq", version="gemv"), "gemv"),
        (spoiled("awq", bits=8), "8 bits"),
        (spoiled("compressed", scheme={"format": "float-quantized"}), "float-quantized"),
        (spoiled("compressed", scheme={"input_activations": {"num_bits": 8}}), "activations"),
        (spoiled("compressed", config_groups={}), "config_groups"),
        (spoiled("compressed", weight_g_idx=torch.arange(256) % 4), "actorder"),
        (spoiled("compressed", weight_shape=torch.tensor([8, -64])), "-64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_refused_by_name(
    layer: tuple[dict[str, Tensor], dict[str, Any]], words_of_it: str
) -> None:
    """A layer read wrongly answers noise; so does one whose order of columns is not known."""
    with pytest.raises(LoadError, match=words_of_it):
        from_checkpoint(*layer)

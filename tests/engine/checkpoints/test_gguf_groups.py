"""GGUF's quantised numbers, taken apart: exactly those that the package gguf makes of the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings, strategies as st

from engine.checkpoints.gguf.groups import KINDS, NotFinite, read_groups
from engine.compute.whole.groups import Groups

_FLOATS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2)}
"""Where a block has its float16 scales; at its beginning if it is not here."""
_EXTREME = (0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 1.0, -65504.0, 65504.0)
"""Subnormal, and the largest that float16 holds."""


def _scales_at(kind: str) -> tuple[int, ...]:
    return _FLOATS.get(kind, (0, 2) if kind == "Q5_1" else (0,))


def _read(kind: str, depth: int, rows: np.ndarray) -> Groups:
    return read_groups(KINDS[kind], rows.shape[0], depth, torch.from_numpy(rows).__getitem__)


def _same(kind: str, depth: int, rows: np.ndarray) -> bool:
    found = _read(kind, depth, rows)
    assert found.numbers.shape == (rows.shape[0], depth)
    assert int(found.numbers.max()) < 1 << found.bits
    right = quants.dequantize(rows, GGMLQuantizationType[kind])
    return np.array_equal(found.widened().numpy().view(np.int32), right.view(np.int32))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), columns=st.integers(1, 9), blocks=st.integers(1, 5))
def test_any_bytes_stand_for_the_numbers_that_gguf_makes_of_them(
    kind: str, seed: int, columns: int, blocks: int
) -> None:
    """Bit for bit; with scales of every size that is finite, subnormal ones and zeros included."""
    random, of = np.random.default_rng(seed), KINDS[kind]
    rows = random.integers(0, 256, (columns, blocks, of.size), dtype=np.uint8)
    for at in _scales_at(kind):
        scales = random.normal(0, 1, (columns, blocks, 1)) * 10.0 ** random.integers(-7, 4, (columns, blocks, 1))
        odd = random.random((columns, blocks, 1)) < 0.3
        values = np.where(odd, random.choice(_EXTREME, (columns, blocks, 1)), scales).astype(np.float16)
        rows[:, :, at : at + 2] = values.view(np.uint8)
    assert (of.values, of.size) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert _same(kind, blocks * of.values, rows.reshape(columns, -1))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_gguf_has_quantised_stands_for_nearly_the_same_weights(kind: str) -> None:
    weights = np.random.default_rng(1).normal(0, 0.1, (37, 96)).astype(np.float32)
    rows = quants.quantize(weights, GGMLQuantizationType[kind])
    assert _same(kind, 96, rows)
    widened = _read(kind, 96, rows).widened().numpy()
    assert np.abs(widened - weights).max() < 0.06


def test_a_weight_of_many_pieces_is_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.checkpoints.gguf.groups._PIECE", 600)
    rows = np.random.default_rng(2).integers(0, 128, (7, 2 * KINDS["Q4_K"].size), dtype=np.uint8)
    rows[:, 1::144], rows[:, 3::144] = 40, 41  # the high bytes of the scales
    assert _same("Q4_K", 512, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_no_numbers_are_refused(kind: str, value: float) -> None:
    for at in _scales_at(kind):
        rows = np.zeros((2, KINDS[kind].size), dtype=np.uint8)
        rows[1, at : at + 2] = np.array([value], dtype=np.float16).view(np.uint8)
        with pytest.raises(NotFinite):
            _read(kind, KINDS[kind].values, rows)


def test_kinds_that_are_tables_are_not_taken_for_groups() -> None:
    others = {kind.name for kind in gguf.GGMLQuantizationType} - set(KINDS)
    assert {"IQ4_NL", "IQ2_XXS", "TQ1_0", "MXFP4", "F16", "Q8_K"} <= others

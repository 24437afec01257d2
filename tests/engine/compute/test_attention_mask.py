"""Masks are read off transformers' own mask functions, at any distance, or not understood."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import masking_utils

from engine.compute.attention_mask import KeyRange, NotUnderstood, read_mask


def _chunked(size: int) -> Callable[..., Tensor]:
    return masking_utils.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))


@given(size=st.integers(1, 300), length=st.integers(2, 400))
@settings(max_examples=60, deadline=None)
def test_windows_and_chunks_are_found_and_short_sequences_have_none(size: int, length: int) -> None:
    """A window that no sequence fills is no window: all that a token can see, it sees."""
    window = read_mask(masking_utils.sliding_window_causal_mask_function(size), length)
    chunk = read_mask(_chunked(size), length)
    if size >= length:
        assert window == chunk == KeyRange()
        return
    # With chunks or windows of one token, or of all but one, the two are the same mask.
    every = torch.arange(length)
    assert torch.equal(window.first(every), torch.clamp(every - size + 1, min=0))
    assert torch.equal(chunk.first(every), every // size * size)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (masking_utils.causal_mask_function, KeyRange()),
        (masking_utils.sliding_window_causal_mask_function(4096), KeyRange(window=4096)),
        (masking_utils.sliding_window_causal_mask_function(131071), KeyRange(window=131071)),
        (_chunked(8192), KeyRange(chunk=8192)),
    ],
)
def test_borders_as_far_as_models_have_them(function: Callable[..., Tensor], found: KeyRange) -> None:
    assert read_mask(function, 131072) == found


def _sinks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The first tokens stay in sight of a sliding window."""
    return ((k > q - 100) | (k < 4)) & (k <= q)


def _far_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Looks like a chunk at first: a window that begins to slide later."""
    return (k <= q) & (k >= torch.clamp(q - 200, min=0) // 50 * 50)


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_bidirectional_overlay(9),
        masking_utils.sliding_window_overlay(9),
        masking_utils.sliding_window_causal_mask_function(0),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k % 7 != 3),
        masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k == q + 1),
        _sinks,
        _far_window,
    ],
)
def test_anything_else_is_not_guessed(function: Callable[..., Tensor]) -> None:
    with pytest.raises(NotUnderstood):
        read_mask(function, 1000)


def test_a_mask_function_that_fails_is_not_understood() -> None:
    def fails(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        raise RuntimeError("Expected all tensors to be on the same device")

    with pytest.raises(NotUnderstood, match="same device"):
        read_mask(fails, 100)


def test_ten_million_tokens_are_read_by_samples() -> None:
    """Llama 4 Scout; a whole row for each probe would take seconds."""
    length = 10_485_760
    assert read_mask(_chunked(8192), length) == KeyRange(chunk=8192)
    with pytest.raises(NotUnderstood):
        read_mask(masking_utils.or_masks(_chunked(8192), lambda b, h, q, k: (k < 4) & (k <= q)), length)

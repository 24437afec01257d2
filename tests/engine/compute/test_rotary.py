"""Rotary embeddings that change while a model runs are fixed, or start anew for each sequence."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.compute import rotary

ORIGINAL = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + n for n in range(8)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def _model(family: str, rope: dict[str, Any], **config: Any) -> nn.Module:
    given = {**tiny_models.COMMON, **tiny_models.FAMILIES[family], "rope_parameters": dict(rope), **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given)).eval()
    return model.requires_grad_(False)  # type: ignore[no-any-return]


def _longrope() -> nn.Module:
    return _model("phi3", LONGROPE, original_max_position_embeddings=ORIGINAL)


def _angles(model: nn.Module, *positions: int) -> Tensor:
    return model.model.rotary_emb(torch.zeros(1, 1, 1), torch.tensor([positions]))[0]  # type: ignore[no-any-return,operator,union-attr]


def test_transformers_lets_a_long_neighbour_change_a_short_sequence() -> None:
    """The reason for all of this; should it end, so can the file."""
    model = _longrope()
    assert not torch.equal(_angles(model, 5)[0, 0], _angles(model, 5, 1000)[0, 0])


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, 2048])
def test_longrope_is_what_transformers_has_for_a_sequence_that_fills_the_context(length: int) -> None:
    plain, pinned = _longrope(), _longrope()
    assert rotary.pin(pinned, length) == ("long" if length > ORIGINAL else "short")
    assert torch.equal(_angles(pinned, *range(length)), _angles(plain, *range(length)))
    alone = _angles(pinned, 5)
    assert torch.equal(_angles(pinned, 5, 2000)[:, :1], alone), "a neighbour"
    assert torch.equal(_angles(pinned, 5), alone), "what ran before"


def test_other_rotary_embeddings_are_left_alone() -> None:
    model = _model(
        "llama", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    )
    before = _angles(model, *range(100))
    assert rotary.pin(model, 2048) is None
    assert not rotary.dynamic(model)
    assert torch.equal(_angles(model, *range(100)), before)


def test_dynamic_scaling_forgets_what_it_saw() -> None:
    model = _model("llama", DYNAMIC, max_position_embeddings=ORIGINAL)
    assert rotary.dynamic(model)
    fresh = _angles(model, *range(ORIGINAL + 10))
    _angles(model, 5 * ORIGINAL)  # a longer sequence raises the base for all that follow
    assert not torch.equal(_angles(model, *range(ORIGINAL + 10)), fresh)
    rotary.reset(model)
    assert torch.equal(_angles(model, *range(ORIGINAL + 10)), fresh)

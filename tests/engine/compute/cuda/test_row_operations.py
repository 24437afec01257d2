"""What a model computes beside the kernels: known to treat every row by itself, or named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from few_rows import few_rows_keep_their_bits
from on_reference import reference_backend
from test_graph_replays import MORE, PACKED, make, runner_of
from torch import Tensor

from engine import LLM

EXPERTS = {"linear", "softmax", "topk", "_grouped_mm"}
DOUBTS: dict[str, set[str]] = {"gpt_oss": EXPERTS, "qwen3_moe": EXPERTS, "mixtral": EXPERTS, "cohere2": {"mean"}}


@pytest.mark.parametrize("family", [*PACKED, *MORE])
def test_doubtful_operations_of_a_family(family: str) -> None:
    from engine.compute.cuda.row_operations import doubtful_operations

    model = make(family, {**PACKED, **MORE}[family])
    runner_of(model)
    found = set(doubtful_operations(model))
    assert found >= DOUBTS.get(family, set())
    assert bool(found) == (family in DOUBTS)


def test_a_family_with_doubtful_operations_is_served_without_the_promise(tiny: Callable[[str], Path]) -> None:
    with reference_backend():
        law = LLM(tiny("gpt_oss"), context_length=256, cache_size="8MiB").info.law
    assert not law.holds
    if not few_rows_keep_their_bits() and law.reason.startswith("bits differ: packed"):
        return  # torch's product gave itself away before that was asked
    assert "computes linear, topk" in law.reason
    assert "may depend on the number of rows" in law.reason


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x - x.mean(-1, keepdim=True), "mean"),
        (lambda x: x / x.norm(dim=-1, keepdim=True), "linalg_vector_norm"),
        (lambda x: x @ torch.eye(64), "matmul"),
        (lambda x: x.cumsum(-1), "cumsum"),
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: x / x.abs().amax(1, keepdim=True), "amax"),
        (lambda x: x / x.max(), "max"),
        (lambda x: x + torch.cat([x[:, :1] * 0, x[:, :-1]], 1), "slice"),
        (lambda x: x + x[:, 3:4], "slice"),
        (lambda x: x + x[:, 3][:, None], "select"),
        (lambda x: x + x.split(36, 1)[0][:, :1], "split"),
        (lambda x: x[:, torch.arange(36, -1, -1)] + x.flip(1), "flip"),
        (lambda x: x + x.transpose(1, 2).amax(-1)[:, None], "amax"),
        (lambda x: torch.nn.functional.layer_norm(x.transpose(1, 2), (37,)).transpose(1, 2), "layer_norm"),
        (lambda x: torch.cat([x[..., 32:], x[..., :32]], -1), None),
        (lambda x: torch.nn.functional.layer_norm(x, (64,)), None),
        (lambda x: x * torch.tanh(x) + x.abs().amax(-1, keepdim=True), None),
    ],
)
def test_what_is_added_to_a_model_is_seen(function: Callable[[Tensor], Tensor], name: str | None) -> None:
    from engine.compute.cuda.row_operations import doubtful_operations

    model: Any = make("llama", {})
    runner_of(model)
    model.model.norm.register_forward_hook(lambda module, given, out: function(out))
    found = doubtful_operations(model)
    assert found == ([] if name is None else found)
    assert name is None or any(name in one or one in name for one in found), found

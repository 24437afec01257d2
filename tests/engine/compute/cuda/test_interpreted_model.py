"""A whole model computed by the kernels themselves, interpreted: near plain transformers, and every row by itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_cuda_modules import make
from torch import Tensor

pytest.importorskip("triton", reason="only installed where kernels are tested")

from graph_stand_in import WholeOperations
from interpreter import install

from engine.compute.attention import IMPLEMENTATION, register_attention
from engine.compute.backend import StepSize
from engine.compute.cuda.backend import CudaBackend
from engine.compute.cuda.runner import CudaRunner
from engine.compute.cuda.triton_operations import TritonOperations
from engine.compute.discovery import discover
from engine.compute.model_runner import PackedStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT = tuple((37 * i + 11) % 448 for i in range(19))


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    install()


def runner_of(model: Any) -> CudaRunner:
    backend = CudaBackend(DEVICE, WholeOperations(TritonOperations()))
    backend.fuse(model, stored=torch.float32, length=256, progress=lambda _: None)
    register_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    found = discover(model, 256)
    assert backend.breaks_law is None
    cache = backend.allocate(found.shapes(), 8)
    return backend.runner(model, cache, 448, StepSize(24, 3, 256), skips_masks=found.skips_masks)


def compute(runner: CudaRunner, *chunks: tuple[int, int, tuple[int, ...]]) -> list[Tensor]:
    """Compute `(start, count, blocks)` of the prompt, one chunk behind the other: logits of each chunk's rows."""
    step = PackedStep([], [], [], [], [])
    for start, count, table in chunks:
        step.add(PROMPT[start : start + count], start, table, count)
    logits, finite = runner.compute(step)
    assert bool(finite.all())
    ends = list(itertools.accumulate(count for _, count, _ in chunks))
    return [logits[end - count : end] for end, (_, count, _) in zip(ends, chunks, strict=True)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # padding rows hold whatever their memory held
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", torch.bfloat16), pytest.param("gemma2", torch.float32, marks=pytest.mark.sweep)],
)
def test_a_model_of_kernels_is_right_and_keeps_the_law(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype).to(DEVICE)
    with torch.inference_mode():
        right = model(torch.tensor([PROMPT], device=DEVICE), use_cache=False).logits[0].float()
    runner = runner_of(model)
    [whole] = compute(runner, (0, 19, (0, 1)))
    bound = 0.06 if dtype == torch.bfloat16 else 1e-4
    assert float((whole - right).abs().max()) <= bound * float(right.abs().max())
    first, beside = compute(runner, (0, 12, (2, 3)), (0, 7, (4,)))
    assert torch.equal(first, whole[:12])
    assert torch.equal(beside, whole[:7])
    rest, one = compute(runner, (12, 7, (2, 3)), (7, 1, (4,)))
    assert torch.equal(rest, whole[12:])
    assert torch.equal(one, whole[7:8])

"""A step that was recorded once computes every other step of its size: for each family of models, by a stand-in."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_models
import torch
from graph_stand_in import StandInRecorder, WholeOperations
from transformers import AutoConfig, AutoModelForCausalLM

from engine.compute import rotary
from engine.compute.attention import IMPLEMENTATION, register_attention
from engine.compute.backend import StepSize
from engine.compute.cuda.backend import CudaBackend
from engine.compute.cuda.reference import TorchOperations
from engine.compute.cuda.runner import CudaRunner
from engine.compute.cuda.steps.graphs import NotCapturable, NoWaits, buckets, smallest
from engine.compute.discovery import discover

CPU = torch.device("cpu")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 64.0,
}
MORE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("qwen2", "granite", "olmo2", "smollm3", "starcoder2", "gpt_neox")},
    "cohere2": {"sliding_window": 24},
    "glm4": {"head_dim": 16},
    "exaone4": {"sliding_window": 24},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "mixtral": {"num_local_experts": 4},
    "phi3 with two sets of frequencies": {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
}
PACKED = {name: extra for name, extra in tiny_models.FAMILIES.items() if name not in ("bloom", "mamba")}


def make(family: str, extra: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **{**tiny_models.COMMON, "max_position_embeddings": 1024, **extra})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    rotary.pin(model, 1024)
    return model


def runner_of(model: Any, rows: int = 12, blocks: int = 80) -> tuple[CudaRunner, StandInRecorder]:
    operations = WholeOperations(TorchOperations())
    backend = CudaBackend(CPU, operations)
    backend.fuse(model, stored=torch.float32, length=1024, progress=lambda _: None)
    register_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    found = discover(model, 1024)
    runner = backend.runner(
        model,
        backend.allocate(found.shapes(), blocks),
        model.config.vocab_size,
        StepSize(rows, 4, 1024),
        skips_masks=found.skips_masks,
    )
    return runner, StandInRecorder(operations)


@pytest.mark.parametrize("family", [*PACKED, *MORE])
def test_a_replayed_step_equals_the_same_step_launched_anew(family: str) -> None:
    """`record` itself compares, on other steps than the recorded one; and here on steps with fewer rows."""
    runner, recorder = runner_of(make(family, {**PACKED, **MORE}[family]))
    assert runner.record(recorder) is None
    assert runner.graphs == len(buckets(12 + 8)), "every size of step"
    assert recorder.launches > 20
    again, _ = runner_of(make(family, {**PACKED, **MORE}[family]))
    for mine, other in ((runner.cache.keys, again.cache.keys), (runner.cache.values, again.cache.values)):
        for one, two in zip(mine, other, strict=True):
            two.copy_(one)
    for size, number in ((8, 3), (8, 5), (2, 1), (1, 0)):
        steps = [one._trial(size, number) for one in (runner, again)]
        (mine, finite), (right, _) = (one.compute(step) for one, step in zip((runner, again), steps, strict=True))
        assert torch.equal(mine, right)
        assert bool(finite.all())


def test_what_reads_a_number_back_is_refused() -> None:
    model = make("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}})
    runner, recorder = runner_of(model)
    said = runner.record(recorder)
    assert said is not None
    assert runner.graphs == 0


def test_a_number_that_is_frozen_is_found() -> None:
    """A model that looks at the host between two steps: its replay would repeat the first one's number."""
    model = make("llama", {})
    runner, recorder = runner_of(model)
    steps = iter(range(1000))
    model.model.norm.register_forward_hook(lambda module, given, out: out * (1 + next(steps)))
    assert "differs from the same step launched anew" in str(runner.record(recorder))
    assert runner.graphs == 0


def test_the_stand_in_refuses_what_a_gpu_would() -> None:
    recorder = StandInRecorder(WholeOperations(TorchOperations()))
    numbers = torch.tensor([1.0, 0.0, 2.0])
    for reads in (lambda: numbers[numbers > 0.5], lambda: numbers * numbers[0].item(), lambda: numbers.nonzero()):
        with pytest.raises(NotCapturable):
            recorder.record(reads)


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, (1,)), (2, (1, 2)), (16, (1, 2, 4, 8, 16)), (20, (1, 2, 4, 8, 16, 20))]
)
def test_sizes_of_steps(most: int, sizes: tuple[int, ...]) -> None:
    assert buckets(most) == sizes
    assert [smallest(sizes, count) for count in range(1, most + 1)] == [
        min(size for size in sizes if size >= count) for count in range(1, most + 1)
    ]


def test_a_runner_that_is_let_go_is_gone_with_its_cache_and_graphs() -> None:
    runner, recorder = runner_of(make("llama", {}))
    assert runner.record(recorder) is None
    kept = weakref.ref(runner)
    gc.disable()
    try:
        del runner, recorder
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("blocks", [1, 2, 19, 40])
@pytest.mark.parametrize("size", [1, 4, 20])
def test_every_trial_computes_a_row_and_shares_no_block(blocks: int, size: int) -> None:
    runner, _ = runner_of(make("llama", {}), blocks=blocks)
    for number in range(3):
        step = runner._trial(size, number)
        used = [block for chunk in step.chunks for block in chunk.table]
        assert step.tokens
        assert step.kept
        assert len(used) == len(set(used)) <= blocks
        assert len(step.tokens) <= size


def test_waits_are_seen_on_their_own_thread_alone() -> None:
    numbers = torch.arange(4.0)
    for waits in (lambda: numbers[0].item(), lambda: numbers.nonzero(), lambda: bool(numbers[1] > 0)):
        with pytest.raises(NotCapturable, match="waits for the device"), NoWaits():
            waits()
        with NoWaits(), ThreadPoolExecutor() as other:
            other.submit(waits).result()
    with NoWaits():
        assert (numbers * 2 + numbers.amax()).shape == (4,)


def test_memory_is_given_back_before_graphs_are_given_up() -> None:
    runner, recorder = runner_of(make("llama", {}))
    assert runner.record(recorder) is None
    graphs = runner.graphs
    assert runner.release_memory()
    assert runner.graphs == graphs
    assert runner.release_memory(again=True)
    assert runner.graphs == 0
    assert not runner.release_memory(again=True), "there is nothing more to give up"
    logits, _ = runner.compute(runner._trial(4, 0))
    assert logits.isfinite().all()

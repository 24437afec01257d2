"""A GPU's memory is divided by what was measured: of the GPUs that are used, and of what really is free."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpus_for_tests import GIB, FakeGpu

from engine import LLM, ModelConfig, NotEnoughMemory, Registry
from engine.compute.kv_cache import KEY_BLOCK, LayerShape
from engine.compute.model_runner import PackedRunner
from engine.config import ModelConfig as Entry
from engine.loading import loader
from engine.loading.loader import load
from engine.loading.memory.cache_size import CacheSize, size_cache
from engine.loading.memory.gpu_budget import GpuBudget
from engine.loading.memory.largest_step import LargestStep
from engine.loading.placement import Placement
from engine.scheduling.block_pool import BLOCK_SIZE

MIB = 2**20
CARD = torch.device("cuda:0")
SECOND = torch.device("cuda:1")


def _entry(**fields: Any) -> ModelConfig:
    return Entry(id="m", path=Path("/nowhere"), **fields)


def _layer(device: torch.device = CARD, heads: int = 8) -> LayerShape:
    return LayerShape(heads, 128, 128, torch.bfloat16, device)  # 4 KiB a token with 8 heads


def _measured(gpu: FakeGpu, *, weights: int, activations: int, graphs: int = 0) -> GpuBudget:
    budget, before = GpuBudget([gpu]), gpu.allocated()  # type: ignore[list-item]
    gpu.tensors += weights
    budget.note_weights()
    budget.measure(lambda: gpu.take(activations), lambda: gpu.hold(graphs))
    assert gpu.allocated() == weights + before, "what was recorded for the measure is gone"
    return budget


def test_the_cache_gets_what_weights_others_and_the_largest_step_leave() -> None:
    gpu = FakeGpu(others=1 * GIB, tensors=2 * GIB)  # another model of this process holds 2 GiB
    budget = _measured(gpu, weights=10 * GIB, activations=512 * MIB, graphs=200 * MIB)
    assert (budget.activations, budget.graphs) == ({CARD: 512 * MIB}, {CARD: 200 * MIB})
    left = 24 * GIB - int(24 * GIB * 0.06) - (1 + 2 + 10) * GIB
    assert budget.room()[CARD] == pytest.approx(left - 512 * MIB - 220 * MIB - 256 * MIB, abs=16)


def test_memory_that_is_kept_for_reuse_is_given_back_before_it_is_measured() -> None:
    """transformers reserves a model's size before it reads it, and a step leaves its activations."""
    gpu = FakeGpu()
    budget = GpuBudget([gpu])  # type: ignore[list-item]
    gpu.tensors, gpu.kept = 8 * GIB, 9 * GIB
    budget.measure(lambda: gpu.take(1 * GIB), lambda: None)
    assert budget.activations[CARD] == 1 * GIB
    gpu.kept = 5 * GIB
    assert budget.room()[CARD] == pytest.approx(int(24 * GIB * 0.94) - 9 * GIB - 256 * MIB, abs=16)


def test_every_gpu_has_room_for_its_own_layers() -> None:
    """The block that does not fit on one GPU cannot be used on another."""
    layers = (_layer(), _layer(), _layer(SECOND))
    spare = 4096 * KEY_BLOCK
    room = {CARD: 2 * (spare + 100 * 4096 * BLOCK_SIZE), SECOND: spare + 70 * 4096 * BLOCK_SIZE}
    assert size_cache(_entry(), 2048, layers, room) == CacheSize(70 * BLOCK_SIZE, 70)
    room[SECOND] = spare + 130 * 4096 * BLOCK_SIZE
    assert size_cache(_entry(), 2048, layers, room).blocks == 100
    with pytest.raises(NotEnoughMemory, match=r"cache for 1600 tokens needs .* 4\.4 MiB are given"):
        size_cache(_entry(context_length=1600), 1600, layers, {CARD: 1 * GIB, SECOND: 4_600_000})


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB", "no kernel image"])
def test_a_cache_that_does_not_fit_is_tried_smaller_and_other_faults_are_not_hidden(message: str) -> None:
    gpu = FakeGpu()
    budget = GpuBudget([gpu])  # type: ignore[list-item]
    tried: list[int] = []

    def make(size: CacheSize) -> str:
        tried.append(size.blocks)
        if len(tried) < 3:
            raise torch.OutOfMemoryError(message) if "memory" in message else RuntimeError(message)
        return "runner"

    if "memory" not in message:
        with pytest.raises(RuntimeError, match="no kernel image"):
            budget.allocate(_entry(), CacheSize(4096, 640), [_layer()], make)
        assert tried == [640]
        return
    size, runner = budget.allocate(_entry(), CacheSize(16384, 640), [_layer()], make)
    assert (tried, runner) == ([640, 560, 490], "runner")
    assert size == CacheSize(490 * BLOCK_SIZE, 490), "the context is what the cache holds"
    assert gpu.releases == 2


def test_a_cache_that_never_fits_is_refused_with_numbers() -> None:
    def make(size: CacheSize) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    budget = GpuBudget([FakeGpu()])  # type: ignore[list-item]
    with pytest.raises(NotEnoughMemory, match="no memory for a cache of") as caught:
        budget.allocate(_entry(), CacheSize(4096, 640), [_layer()], make)
    assert caught.value.details["needed"] > 0
    with pytest.raises(NotEnoughMemory, match=r"the cache for 10000 tokens needs .* lower context_length"):
        budget.allocate(_entry(context_length=10_000), CacheSize(10_000, 640), [_layer()], make)


def test_the_sentence_adds_up() -> None:
    gpu = FakeGpu(others=300 * MIB, tensors=212 * MIB)  # of another model in this process
    budget = _measured(gpu, weights=int(15.3 * GIB), activations=512 * MIB, graphs=300 * MIB)
    budget.room()
    size = CacheSize(4096, 50_000 // BLOCK_SIZE)
    layers = [_layer()] * 32
    gpu.tensors += sum(layer.bytes_per_token for layer in layers) * size.tokens
    assert budget.describe(size, layers) == (
        "24.0 GiB: weights 15.3, cache 6.1 (50,000 tokens), activations 0.5, graphs 0.3, others 0.5, free 1.3"
    )
    [use] = budget.use(size, layers)
    assert use.weights + use.cache + use.activations + use.graphs + use.others <= use.total


def test_what_steps_of_other_models_need_is_left_to_them() -> None:
    """Between two steps it looks free: torch keeps it for reuse, and gives it back when it is asked to."""
    other = {CARD: 3 * GIB, SECOND: 9 * GIB}
    alone, beside = (GpuBudget([FakeGpu()], models) for models in ((), (other, other)))  # type: ignore[list-item]
    assert alone.room()[CARD] - beside.room()[CARD] == 6 * GIB


def test_memory_that_runs_out_while_graphs_are_measured_refuses_nobody(caplog: pytest.LogCaptureFixture) -> None:
    budget = GpuBudget([FakeGpu()])  # type: ignore[list-item]

    def record() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    budget.measure(lambda: None, record)
    assert budget.graphs[CARD] == 0
    assert "while steps were recorded to measure them" in caplog.text
    with pytest.raises(RuntimeError, match="no kernel image"):
        budget.measure(lambda: None, lambda: _raise(RuntimeError("no kernel image")))


def _raise(error: Exception) -> None:
    raise error


def test_two_gpus_are_told_apart_and_none_says_nothing() -> None:
    gpus = [FakeGpu(), FakeGpu(SECOND, size=12 * GIB)]
    budget = GpuBudget(gpus)  # type: ignore[arg-type]
    told = budget.describe(CacheSize(16, 1), [_layer(), _layer(SECOND)])
    assert told.startswith("cuda:0 24.0 GiB: ")
    assert "; cuda:1 12.0 GiB: " in told
    assert GpuBudget([]).describe(CacheSize(16, 1), []) == ""


# -- the largest step -------------------------------------------------------------------------------------------------


class _Watched:
    """A runner that notes what it is asked for."""

    def __init__(self, runner: PackedRunner) -> None:
        self.runner, self.vocab_size, self.asked = runner, runner.vocab_size, []

    def forward(self, schedule: Any) -> Any:
        self.asked.append([(c.start, c.count, c.num_rows) for c in schedule.chunks])
        result = self.runner.forward(schedule)
        assert result.logits.shape[0] == sum(rows for _, _, rows in self.asked[-1])
        return result


def test_the_largest_step_is_as_large_as_steps_can_be_and_needs_a_small_cache(tiny: Callable[[str], Path]) -> None:
    model = LLM(tiny("qwen3"), cache_size="8MiB").engine.model
    runner: Any = model.runner
    step = LargestStep(tokens=100, logit_rows=24, sequences=5, context=1500)
    cache = runner._backend.allocate(runner.cache.layers, step.num_blocks)
    watched: Any = _Watched(PackedRunner(runner._model.model, runner._backend, cache, runner.vocab_size))
    step.run(watched, torch.device("cpu"))
    assert watched.asked == [[(1400, 100, 24)], [(1499, 1, 1)] * 5]
    assert step.num_blocks == 8


def test_prompts_shorter_than_a_step_fill_it_together(tiny: Callable[[str], Path]) -> None:
    model = LLM(tiny("qwen3"), cache_size="8MiB").engine.model
    watched: Any = _Watched(model.runner)  # type: ignore[arg-type]
    LargestStep(tokens=100, logit_rows=50, sequences=3, context=40).run(watched, torch.device("cpu"))
    assert watched.asked == [[(0, 40, 40), (0, 40, 10), (20, 20, 0)], [(39, 1, 1)] * 3]


def test_a_step_has_no_more_prompts_than_sequences(tiny: Callable[[str], Path]) -> None:
    watched: Any = _Watched(LLM(tiny("qwen3"), cache_size="8MiB").engine.model.runner)  # type: ignore[arg-type]
    LargestStep(tokens=512, logit_rows=50, sequences=1, context=40).run(watched, torch.device("cpu"))
    assert watched.asked == [[(0, 40, 40)], [(39, 1, 1)]]


# -- a whole start ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("qwen3"), tmp_path / "model"))


def _with_gpu(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    """A GPU that computes like the CPU."""
    monkeypatch.setattr(Placement, "gpus", property(lambda self: (gpu,)))


def test_a_start_measures_a_step_and_says_what_the_memory_is_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = FakeGpu(torch.device("cpu"), size=2 * GIB)
    _with_gpu(monkeypatch, gpu)
    monkeypatch.setattr(LargestStep, "run", lambda self, runner, device: gpu.take(100 * MIB))
    with caplog.at_level("INFO", "verbatim.engine"):
        info = load(ModelConfig(id="m", path=folder)).info
    assert info.memory == f"2.0 GiB: weights 0.0, cache 0.0 ({info.cache_tokens:,} tokens), activations 0.1, free 1.9"
    assert f"m: {info.memory}" in caplog.text
    plenty = info.cache_tokens
    gpu.size = 382 * MIB  # 94 %, less 256 MiB and a step of 100 MiB: 3 MiB
    info = load(ModelConfig(id="m", path=folder)).info
    assert 0 < info.cache_tokens < plenty / 4
    gpu.size = 370 * MIB
    with pytest.raises(NotEnoughMemory, match="given to it"):
        load(ModelConfig(id="m", path=folder))


def test_a_start_tries_a_smaller_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(torch.device("cpu"), size=2 * GIB)
    _with_gpu(monkeypatch, gpu)
    honest, failed = loader._runner, []

    def runner(config: Any, ready: Any, size: CacheSize, **more: Any) -> Any:
        if size.blocks > 1000 and len(failed) < 2:
            failed.append(size.blocks)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(config, ready, size, **more)

    monkeypatch.setattr(loader, "_runner", runner)
    model = load(ModelConfig(id="m", path=folder))
    assert failed == [2048, 1792]
    assert model.info.cache_tokens == 1568 * BLOCK_SIZE
    assert model.scheduler.pool.num_blocks == 1568


def test_a_second_model_leaves_the_first_its_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the registry, as a server loads them."""
    gpu = FakeGpu(torch.device("cpu"), size=2 * GIB)
    _with_gpu(monkeypatch, gpu)
    monkeypatch.setattr(LargestStep, "run", lambda self, runner, device: gpu.take(100 * MIB))
    made: list[GpuBudget] = []
    real = GpuBudget.__init__

    def noted(self: GpuBudget, *given: Any) -> None:
        made.append(self)
        real(self, *given)

    monkeypatch.setattr(GpuBudget, "__init__", noted)
    entries = [ModelConfig(id=name, path=folder, cache_size="1MiB", max_sequences=1) for name in ("one", "two")]
    registry = Registry(entries)
    registry.start()
    registry.wait()
    registry.close()
    one, two = (budget.room()[gpu.device] for budget in made)
    assert one - two == 100 * MIB


def test_without_a_gpu_there_is_nothing_to_say(folder: Path) -> None:
    assert load(ModelConfig(id="m", path=folder)).info.memory == ""

"""The seam for devices: whatever backend computes, neutral code sees the same cache, plan and answers."""

from __future__ import annotations

import pytest
import torch

from engine.compute.attention_mask import KeyRange
from engine.compute.backend import AttentionSettings, Backend, PackedChunk
from engine.compute.cpu.backend import CpuBackend
from engine.compute.cpu.kernels import Kernels
from engine.compute.kv_cache import KVCache, LayerShape
from engine.compute.torch_backend import TorchBackend
from engine.scheduling.block_pool import BLOCK_SIZE

CPU = torch.device("cpu")
TABLE = (2, 0, 3)
LENGTH = 2 * BLOCK_SIZE + 5


def _shape(key_dim: int, value_dim: int, window: int | None = None) -> LayerShape:
    return LayerShape(2, key_dim, value_dim, torch.float32, CPU, KeyRange(window=window))


def _numbers(heads: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(heads, LENGTH, dim, generator=torch.Generator().manual_seed(seed))


SHAPES = [_shape(32, 32), _shape(48, 16, window=9), _shape(24, 20)]
"""The last one's values fill no vector: the CPU backend leaves it to torch."""
STATES = [(_numbers(4, s.key_dim, 1), _numbers(2, s.key_dim, 2), _numbers(2, s.value_dim, 3)) for s in SHAPES]
SETTINGS = [AttentionSettings(4, 0.2), AttentionSettings(4, 0.1, softcap=5.0), AttentionSettings(4, 0.2)]


def _attend(backend: Backend, cache: KVCache, start: int, count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    plan = backend.plan(cache, [PackedChunk(0, count, start, TABLE[: -(-(start + count) // BLOCK_SIZE)])])
    part = slice(start, start + count)
    layers = enumerate(zip(STATES, SETTINGS, strict=True))
    found = [plan.attend(i, *(t[:, part] for t in states), settings) for i, (states, settings) in layers]
    return found, plan.finite()


def test_backends_agree_layer_by_layer(kernels: Kernels) -> None:
    """One cache may hold layers that the kernel serves and layers that it does not."""
    ours, plain = CpuBackend(kernels), TorchBackend(CPU)
    assert getattr(ours.allocate(SHAPES, 1), "native") == (True, True, False)  # noqa: B009
    for start, count in ((0, LENGTH), (LENGTH - 1, 1)):
        one, finite = _attend(ours, _written(ours), start, count)
        other, _ = _attend(plain, _written(plain), start, count)
        assert finite.tolist() == [True] * count
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _written(backend: Backend) -> KVCache:
    """A cache that holds the whole sequence, through the face that neutral code has."""
    cache = backend.allocate(SHAPES, 4)
    slots = torch.tensor(PackedChunk(0, LENGTH, 0, TABLE).slots())
    for layer, (_, key, value) in enumerate(STATES):
        cache.write(layer, slots, key, value)
    return cache


def test_what_is_written_is_what_a_step_stores(kernels: Kernels) -> None:
    """In the layout of each layer, whichever that is: the self-test fills caches without attending."""
    for backend in (CpuBackend(kernels), TorchBackend(CPU)):
        stepped = backend.allocate(SHAPES, 4)
        _attend(backend, stepped, 0, LENGTH)
        written = _written(backend)
        for one, other in zip([*stepped.keys, *stepped.values], [*written.keys, *written.values], strict=True):
            assert torch.equal(one, other)


def test_nothing_of_a_gpu_is_asked_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question to a GPU waits until it has computed everything before."""
    asked = []
    own = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (asked.append(self), own(self))[1])
    backend = TorchBackend(CPU)
    plan = backend.plan(backend.allocate(SHAPES, 4), [PackedChunk(0, LENGTH, 0, TABLE)])
    for i, (states, settings) in enumerate(zip(STATES, SETTINGS, strict=True)):
        plan.attend(i, *states, settings)
    assert plan.finite().shape == (LENGTH,)
    assert not asked
    assert plan.finite().all()


@pytest.mark.parametrize("layer", range(len(SHAPES)))
def test_a_row_that_is_not_finite_is_told_by_any_layer(kernels: Kernels, layer: int) -> None:
    for backend in (CpuBackend(kernels), TorchBackend(CPU)):
        cache = backend.allocate(SHAPES, 1)
        plan = backend.plan(cache, [PackedChunk(0, 3, 0, (0,))])
        for i, (states, settings) in enumerate(zip(STATES, SETTINGS, strict=True)):
            query, key, value = (t[:, :3].clone() for t in states)
            if i == layer:
                key[1, 1, 0] = float("inf")
            plan.attend(i, query, key, value, settings)
        assert plan.finite().tolist() == [True, False, True]
        assert all(t.isfinite().all() for t in (*cache.keys, *cache.values))

"""The kernels behind the interface: they compute what torch does there, and prepare nothing twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton comes with a CUDA build of torch, or with the development tools")

import interpreter

from engine.compute.backend import AttentionSettings, PackedChunk
from engine.compute.cuda.kernels import rows
from engine.compute.cuda.operations import AttentionWork, LinearWeight, Operations, Partials
from engine.compute.cuda.steps.tables import ITEM, MERGE, AttentionKind, Limits, StepTables
from engine.compute.cuda.triton_operations import TritonOperations
from engine.compute.kv_cache import LayerShape
from engine.scheduling.block_pool import BLOCK_SIZE

interpreter.install()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def int32(numbers: object) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=DEVICE)


def test_rows_go_through_a_layer_as_in_torch() -> None:
    operations: Operations = TritonOperations()
    x, weight, bias, scale = normal(3, 64), normal(48, 64), normal(48), normal(64)
    normed = operations.rms_norm(x, scale, 1e-6, "weight")
    torch.testing.assert_close(normed, F.rms_norm(x, (64,), scale, 1e-6))
    product = operations.linear(normed, LinearWeight(weight, bias=bias), torch.float32)
    torch.testing.assert_close(product, F.linear(normed, weight, bias), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(operations.silu_mul(product), F.silu(product[:, :24]) * product[:, 24:])


def test_what_is_stored_is_attended_to_and_copied() -> None:
    operations: Operations = TritonOperations()
    shape = LayerShape(2, 16, 16, torch.float32, DEVICE)
    settings = AttentionSettings(4, 0.25)
    chunk = PackedChunk(0, 12, 0, (1,))
    limits = Limits(12, 1, 64, operations.tile_rows)
    tables = StepTables.of([chunk], [AttentionKind(2)], limits)
    (items,) = tables.kinds
    work = AttentionWork(
        int32(items.narrow).view(-1, ITEM),
        int32(items.wide).view(-1, ITEM),
        int32(items.merges).view(-1, MERGE),
        int32(items.counts),
        int32(tables.blocks),
    )
    partials = Partials(zeros(1, 4, 16), zeros(1, 4), zeros(1, 4))
    query, key, value = normal(4, 12, 16), normal(2, 12, 16), normal(2, 12, 16) + 1
    keys, values = zeros(2, 3 * BLOCK_SIZE, 16), zeros(2, 3 * BLOCK_SIZE, 16)
    finite, count = int32([1] * 12), int32([12])
    operations.store(key, value, keys, values, torch.tensor(tables.slots, device=DEVICE), count, finite)
    out = operations.attend(query, keys, values, work, partials, shape, settings)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    pairs = int32([[1, 2], [2, 0]])
    operations.copy_blocks([keys, values], pairs, int32([1]))
    assert torch.equal(keys[:, 32:44], key)
    assert torch.equal(values[:, 32:44], value)
    assert not keys[:, :16].any()


def test_the_cache_is_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step must not send anything: the first call has."""
    operations = TritonOperations()
    made: list[int] = []
    described = rows.CacheTable

    def count(tensors: list[torch.Tensor]) -> rows.CacheTable:
        made.append(len(tensors))
        return described(tensors)

    monkeypatch.setattr(rows, "CacheTable", count)
    tensors = [zeros(1, 2 * BLOCK_SIZE, 8), zeros(2, 2 * BLOCK_SIZE, 8)]
    none = int32([[0, 1]]), int32([0])
    operations.copy_blocks(tensors, *none)
    operations.copy_blocks(tensors, *none)
    assert made == [2]
    operations.copy_blocks(tensors[:1], *none)
    assert made == [2, 1]

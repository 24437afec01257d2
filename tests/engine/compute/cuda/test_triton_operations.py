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
from engine.compute.cuda.step_tables import ITEM, MERGE, AttentionKind, Limits, StepTables
from engine.compute.cuda.triton_operations import TritonOperations
from engine.compute.kv_cache import LayerShape
from engine.scheduling.block_pool import BLOCK_SIZE

interpreter.install()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


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
    shape = LayerShape(2, 16, 16, torch.float32, torch.device("cpu"))
    settings = AttentionSettings(4, 0.25)
    chunk = PackedChunk(0, 12, 0, (1,))
    limits = Limits(12, 1, 64, operations.tile_rows)
    tables = StepTables.of([chunk], [AttentionKind(2)], limits)
    (items,) = tables.kinds
    work = AttentionWork(
        torch.tensor(items.narrow, dtype=torch.int32).view(-1, ITEM),
        torch.tensor(items.wide, dtype=torch.int32).view(-1, ITEM),
        torch.tensor(items.merges, dtype=torch.int32).view(-1, MERGE),
        torch.tensor(items.counts, dtype=torch.int32),
        torch.tensor(tables.blocks, dtype=torch.int32),
    )
    partials = Partials(torch.empty(1, 4, 16), torch.empty(1, 4), torch.empty(1, 4))
    query, key, value = normal(4, 12, 16), normal(2, 12, 16), normal(2, 12, 16) + 1
    keys, values = torch.zeros(2, 3 * BLOCK_SIZE, 16), torch.zeros(2, 3 * BLOCK_SIZE, 16)
    finite, count = torch.ones(12, dtype=torch.int32), torch.tensor([12], dtype=torch.int32)
    operations.store(key, value, keys, values, torch.tensor(tables.slots), count, finite)
    out = operations.attend(query, keys, values, work, partials, shape, settings)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    pairs = torch.tensor([[1, 2], [2, 0]], dtype=torch.int32)
    operations.copy_blocks([keys, values], pairs, torch.tensor([1], dtype=torch.int32))
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
    tensors = [torch.ones(1, 2 * BLOCK_SIZE, 8), torch.ones(2, 2 * BLOCK_SIZE, 8)]
    none = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    operations.copy_blocks(tensors, *none)
    operations.copy_blocks(tensors, *none)
    assert made == [2]
    operations.copy_blocks(tensors[:1], *none)
    assert made == [2, 1]

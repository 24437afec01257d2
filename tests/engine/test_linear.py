"""A row's bits do not depend on how many rows are computed with it; the bare library breaks this."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.linear import KERNELS, PackedLinear, WideningEmbedding, _rows_are_independent, choose_kernel, pack_model


@pytest.mark.parametrize(("k", "n"), [(64, 96), (1024, 512), (2048, 64), (96, 449)])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_independent(k: int, n: int, bias: bool) -> None:
    """With the kernel that is chosen on this machine, whichever it is."""
    generator = torch.Generator().manual_seed(k + n)
    kernel = KERNELS[choose_kernel(nn.Sequential(nn.Linear(k, n)))]
    layer = kernel(torch.randn(n, k, generator=generator), torch.randn(n, generator=generator) if bias else None)
    x = torch.randn(130, k, generator=generator)
    whole = layer(x)
    for count in (1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 100, 129):
        for start in (0, 1, 7, 130 - count):
            assert torch.equal(layer(x[start : start + count]), whole[start : start + count]), (count, start)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(layer(x), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_product(kernel: str) -> None:
    linear = nn.Linear(48, 33)
    x = torch.randn(2, 5, 48)
    packed = KERNELS[kernel](linear.weight, linear.bias)
    torch.testing.assert_close(packed(x), linear(x))
    assert torch.equal(packed.weight, linear.weight)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), Conv1D(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 10, bias=False)
        self.embed.weight = nn.Parameter(torch.randn(10, 8).bfloat16().float(), requires_grad=False)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, module: nn.Module) -> None:
        self.embed = module  # type: ignore[assignment]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(ids)))


@torch.inference_mode()
def test_a_model_is_packed_in_place_and_no_original_is_left() -> None:
    model = _Tied()
    ids = torch.tensor([[1, 2, 9]])
    expected = model(ids)
    assert pack_model(model, torch.bfloat16) == 3
    torch.testing.assert_close(model(ids), expected)
    assert isinstance(model.embed, WideningEmbedding)
    large = {name: p.dtype for name, p in model.named_parameters() if p.dim() > 1}
    assert large == {"embed.inner.weight": torch.bfloat16}, "the embedding is all that is left of the originals"


@torch.inference_mode()
def test_an_embedding_that_would_lose_bits_stays_wide() -> None:
    model = _Tied()
    model.embed.weight += 1e-7
    pack_model(model, torch.bfloat16)
    assert model.embed.weight.dtype == torch.float32


def test_a_kernel_that_mixes_rows_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN 3.10 does on AVX2: the bits of a row change with the number of rows."""
    honest = PackedLinear.forward

    def mixing(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        return honest(self, x) * (1 + 1e-6 * (x.shape[0] % 3 == 1))

    monkeypatch.setattr(PackedLinear, "forward", mixing)
    assert not _rows_are_independent("packed", 64, 96)

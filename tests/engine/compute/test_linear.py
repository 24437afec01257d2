"""A row's bits do not depend on how many rows are computed with it; the bare library breaks this."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.compute.cpu.kernels import Kernels, NoKernels
from engine.compute.cpu.layers.pointwise import replace_pointwise
from engine.compute.cpu.linear import NativeLinear, merge_shared_projections
from engine.compute.linear import (
    TORCH_LINEARS,
    Make,
    PackedLinear,
    WideningEmbedding,
    choose_linear,
    is_sound,
    is_sound_for,
    pack_model,
    quasi_random,
)


@pytest.fixture(scope="module")
def native() -> Kernels | None:
    try:
        return Kernels.load()
    except NoKernels:
        return None


def _kinds(native: Kernels | None) -> dict[str, Make]:
    """The kinds of linear layers there are for exact weights on this machine."""
    ours: dict[str, Make] = {} if native is None else {"native": partial(NativeLinear, native, "exact")}
    return {**ours, **TORCH_LINEARS}


@pytest.mark.parametrize(("k", "n"), [(64, 96), (1024, 512), (2048, 64), (96, 449)])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_independent(native: Kernels | None, k: int, n: int, bias: bool) -> None:
    """With the kernel that is chosen on this machine, whichever it is."""
    generator = torch.Generator().manual_seed(k + n)
    model = nn.Sequential(nn.Linear(k, n))
    make = next((make for make in _kinds(native).values() if is_sound_for(model, make)), choose_linear(model)[1])
    layer = make(torch.randn(n, k, generator=generator), torch.randn(n, generator=generator) if bias else None)
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


@pytest.mark.parametrize("kernel", ["native", "packed", "strict"])
def test_it_is_the_product(native: Kernels | None, kernel: str) -> None:
    here = _kinds(native)
    if kernel not in here:
        pytest.skip("no compiled kernels on this machine")
    linear = nn.Linear(48, 33)
    x = torch.randn(2, 5, 48)
    packed = here[kernel](linear.weight, linear.bias)
    torch.testing.assert_close(packed(x), linear(x))
    torch.testing.assert_close(packed.weight, linear.weight, rtol=0, atol=1e-7)
    assert torch.equal(packed.bias, linear.bias)


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
    assert not is_sound(PackedLinear, 64, 96)


def test_a_kernel_that_is_not_the_product_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a miscompiled one would be: wrong, and independent of its rows all the same."""
    honest = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: honest(self, x) * 1.01)
    assert not is_sound(PackedLinear, 64, 96)


class _Block(nn.Module):
    """q, k and v of one input; o of another; an input that is changed in place between two layers if `rude`."""

    def __init__(self, rude: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, n) for n in (16, 8, 8, 16))
        self.embed = nn.Embedding(10, 16)
        self.rude = rude

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> _Block:
        x = self.embed(ids)
        q = self.q(x)
        if self.rude:
            x += 1
        self.logits = self.o(q) + torch.cat([self.k(x), self.v(x)], -1)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


@torch.inference_mode()
def test_layers_with_one_input_are_computed_together(native: Kernels | None) -> None:
    if native is None:
        pytest.skip("no compiled kernels on this machine")
    make = _kinds(native)["native"]
    model = _Block()
    pack_model(model, make=make)
    ids = torch.tensor([[1, 2, 3], [3, 4, 5]])
    alone = model(ids).logits
    assert merge_shared_projections(model) == 1
    group = {layer.shared[0] for layer in (model.q, model.k, model.v)}
    assert len(group) == 1
    assert model.o.shared is None
    assert torch.equal(model(ids).logits, alone)
    assert torch.equal(model.k(torch.ones(2, 16)), model.k(torch.ones(2, 16))), "alone, and twice, as well"


@torch.inference_mode()
def test_an_input_that_changes_in_between_is_not_shared(native: Kernels | None) -> None:
    if native is None:
        pytest.skip("no compiled kernels on this machine")
    make = _kinds(native)["native"]
    model = _Block(rude=True)
    pack_model(model, make=make)
    ids = torch.tensor([[1, 2, 3]])
    alone = model(ids).logits
    assert merge_shared_projections(model) == 0
    assert torch.equal(model(ids).logits, alone)
    assert all(layer.shared is None for layer in model.modules() if isinstance(layer, NativeLinear))


class _Rms(nn.Module):
    """As Llama's, or as Gemma's, which keeps the difference to one."""

    def __init__(self, shift: float, power: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24), requires_grad=False)
        self.eps, self.shift, self.power = 1e-5, shift, power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(self.power).abs().mean(-1, keepdim=True) + self.eps)
        return (self.weight + self.shift) * (x * scale)


@torch.inference_mode()
def test_norms_are_known_by_what_they_compute(native: Kernels | None) -> None:
    if native is None:
        pytest.skip("no compiled kernels on this machine")
    model = nn.Sequential(_Rms(0.0), _Rms(1.0), nn.LayerNorm(24), nn.LayerNorm(24, bias=False), _Rms(0.0, power=4))
    x = torch.randn(2, 3, 24)
    expected = [layer(x) for layer in model]
    assert replace_pointwise(model, native) == 3
    assert [type(layer).__name__ for layer in model] == ["NativeNorm", "NativeNorm", "LayerNorm", "NativeNorm", "_Rms"]
    for layer, right in zip(model, expected, strict=True):
        torch.testing.assert_close(layer(x), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(704, 256), (1024, 3072), (3072, 1024)])
def test_rows_of_narrow_numbers_are_independent(dtype: torch.dtype, depth: int, columns: int) -> None:
    """`dtype: bfloat16` on a CPU runs in oneDNN as it is; with AMX a row's bits would depend on how many there are."""
    x, weight = quasi_random(520, depth).to(dtype), quasi_random(columns, depth).to(dtype)
    whole = F.linear(x, weight)
    for rows in (2, 3, 4, 8, 17, 33, 64, 129, 200):
        assert torch.equal(F.linear(x[:rows], weight), whole[:rows]), rows

"""Weights that a model multiplies with by itself, packed: the same numbers, and bits that depend on a row alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.own_weight import OwnWeight
from engine.compute.cpu.layers.own_weights import pack_own_weights
from engine.compute.cpu.linear import NativeLinear
from engine.compute.cpu.stored_linear import WeightChanged


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32)


class _Router(nn.Module):
    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(_random(60, 48), requires_grad=False)
        self.bias = nn.Parameter(_random(60), requires_grad=False) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.type(torch.float32), self.weight.type(torch.float32), bias=self.bias)


class _OneByOne(nn.Module):
    """Experts that are visited one after the other, and without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(_random(5, 24, 48) * 0.2, requires_grad=False)
        self.down_proj = nn.Parameter(_random(5, 48, 24) * 0.2, requires_grad=False)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique():
            rows = torch.where(chosen == expert)[0]
            y = F.linear(F.relu(F.linear(x[rows], self.up_proj[expert])), self.down_proj[int(expert)])
            out.index_add_(0, rows, y)
        return out


class _Model(nn.Module):
    """Takes tokens and returns `logits`, as a model does."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 48)
        self.embedding.requires_grad_(False)
        self.router, self.experts = _Router(biased=True), _OneByOne()
        self.transposed = nn.Parameter(_random(48, 48) * 0.1, requires_grad=False)

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Any:
        x = self.embedding(tokens)[0]
        chosen = self.router(x).argmax(-1) % 5
        y = self.experts(x, chosen) @ self.transposed.T
        logits = F.linear(y, self.embedding.weight)
        return type("Output", (), {"logits": logits[None]})


def _pack(kernels: Kernels, model: nn.Module) -> int:
    make = partial(NativeLinear, kernels, "exact")
    return pack_own_weights(model, kernels, make, make)


def test_weights_of_routers_and_experts_are_found_and_no_others(kernels: Kernels) -> None:
    model = _Model()
    tokens = torch.arange(16, dtype=torch.int64)[None]
    before = model(tokens).logits
    assert _pack(kernels, model) == 3
    packed = (model.router.weight, model.experts.up_proj, model.experts.down_proj)
    assert all(isinstance(weight, OwnWeight) for weight in packed)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["transposed", "embedding.weight", "router.bias"], "what is looked up or turned stays"
    after = model(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for row in range(16):
        x = model.embedding(tokens)[0]
        assert torch.equal(model.router(x[row : row + 1])[0], model.router(x)[row])
        chosen = torch.arange(16, dtype=torch.int64) % 5
        part = slice(row, row + 3)
        assert torch.equal(model.experts(x[part], chosen[part]), model.experts(x, chosen)[part])


def test_a_model_that_is_called_in_another_way_stays_as_it_is(kernels: Kernels) -> None:
    router = _Router()
    assert _pack(kernels, router) == 0
    assert isinstance(router.weight, nn.Parameter)


def _own(kernels: Kernels, weight: Tensor) -> OwnWeight:
    parts = [weight] if weight.dim() == 2 else list(weight)
    return OwnWeight.of(kernels, [kernels.pack(part, None) for part in parts], weight.shape)


def test_it_can_be_asked_and_used_like_the_weight_it_was(kernels: Kernels) -> None:
    weight, several = _random(7, 12), _random(3, 7, 12)
    own, parts = _own(kernels, weight), _own(kernels, several)
    assert (own.shape, own.dtype, own.device.type, own.dim(), own.size(0), len(parts)) == (
        (7, 12),
        torch.float32,
        "cpu",
        2,
        7,
        3,
    )
    assert own.float() is own
    assert own.to(torch.float32) is own
    assert torch.equal(own.T, weight.T)
    assert torch.equal(own + 1, weight + 1)
    assert torch.equal(own.double(), weight.double())
    assert torch.equal(own[2:4], weight[2:4])
    assert torch.equal(parts[1] * 2, several[1] * 2)
    assert torch.equal(parts[torch.tensor(2)].sum(), several[2].sum())
    assert torch.equal(parts[:, 0], several[:, 0])
    x = _random(5, 12)
    assert torch.equal(torch.matmul(x, own.T), x @ weight.T), "torch's own product, of a copy"
    torch.testing.assert_close(F.linear(x, own, _random(7)), F.linear(x, weight, _random(7)))
    torch.testing.assert_close(F.linear(x, parts[2]), F.linear(x, several[2]))
    torch.testing.assert_close(F.linear(x.double(), own.double()), F.linear(x.double(), weight.double()))


def _added(weight: Tensor) -> None:
    weight += 1


_CHANGES: dict[str, Any] = {
    "multiplied": lambda w: w.mul_(2),
    "cleared": lambda w: w.zero_(),
    "a row": lambda w: w.__setitem__(0, 1.0),
    "added": _added,
    "through a view": lambda w: w.view(-1).mul_(2),
    "transposed": lambda w: w.T.clamp_(0),
    "its data": lambda w: w.data.mul_(2),
    "as the place of a result": lambda w: torch.mul(_random(7, 12), 2, out=w),
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_it_cannot_be_changed(kernels: Kernels, change: Any) -> None:
    """A copy would be, and nobody would see it."""
    with pytest.raises(WeightChanged, match="a weight that is packed"):
        change(_own(kernels, _random(7, 12)))


def test_a_part_cannot_be_changed_before_the_model_is_fused(kernels: Kernels) -> None:
    parts = [kernels.pack(weight, None) for weight in _random(3, 7, 12)]
    own = OwnWeight.of(kernels, parts, torch.Size((3, 7, 12)), plain=True)
    with pytest.raises(WeightChanged):
        own[1].mul_(2)


_READINGS: dict[str, Any] = {
    "joined": lambda w: torch.cat([w, w]),
    "stacked": lambda w: torch.stack((_random(7, 12), w)),
    "copied into another": lambda w: torch.zeros(7, 12, dtype=torch.float32).copy_(w),
    "added to another": lambda w: _random(7, 12).add_(w),
    "multiplied with": lambda w: _random(2, 12) @ w.T,
}


@pytest.mark.parametrize("read", _READINGS.values(), ids=_READINGS)
def test_what_only_reads_it_gets_its_numbers(kernels: Kernels, read: Any) -> None:
    """Also where it is one of several in a list, and where another tensor is changed."""
    weight = _random(7, 12)
    found = read(_own(kernels, weight))
    assert type(found) is Tensor
    assert torch.equal(found, read(weight))

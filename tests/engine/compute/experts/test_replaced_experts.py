"""Experts of models, replaced by the kernel: those it computes, in every layout, and no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.experts import NativeExperts, replace_experts
from engine.compute.cpu.linear import NativeLinear

Gate = Callable[[Tensor, Tensor], Tensor]
EXPERTS, DIM, INNER = 6, 32, 24


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32)


def _clamped(gate: Tensor, up: Tensor, limit: float = 7.0) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class _Experts(nn.Module):
    """Experts in one of the layouts of transformers, computed one after the other."""

    def __init__(self, gate: Gate, transposed: bool, turns: bool, biased: bool, inner: int = INNER) -> None:
        super().__init__()
        self.gate, self.transposed, self.turns, self.biased = gate, transposed, turns, biased
        shapes = {"gate_up_proj": (EXPERTS, 2 * inner, DIM), "down_proj": (EXPERTS, DIM, inner)}
        for seed, (name, shape) in enumerate(shapes.items()):
            weight = _random(*shape, seed=seed) * shape[2] ** -0.5
            stored = weight.transpose(1, 2).contiguous() if transposed else weight
            setattr(self, name, nn.Parameter(stored, requires_grad=False))
            if biased:
                setattr(self, f"{name}_bias", nn.Parameter(_random(*shape[:2], seed=seed), requires_grad=False))

    def _product(self, x: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        out = F.linear(x, weight.T if self.transposed else weight)
        return out + getattr(self, f"{name}_bias")[expert] if self.biased else out

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(len(self.down_proj)):
            row, choice = torch.where(chosen == expert)
            both = self._product(x[row], "gate_up_proj", expert)
            gate, up = (both[:, ::2], both[:, 1::2]) if self.turns else both.chunk(2, -1)
            y = self._product(self.gate(gate, up), "down_proj", expert)
            out.index_add_(0, row, y * weights[row, choice, None])
        return out


def _replaced(kernels: Kernels, module: nn.Module, kind: str = "exact") -> nn.Module:
    parent = nn.ModuleDict({"experts": module})
    replace_experts(parent, kernels, partial(NativeLinear, kernels, kind), partial(NativeLinear, kernels, "exact"))
    return parent["experts"]


def _choices(rows: int, choices: int, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows + choices)
    chosen = torch.stack([torch.randperm(experts, generator=draw)[:choices] for _ in range(rows)])
    return chosen, torch.rand(rows, choices, generator=draw, dtype=torch.float32)


_GATES: dict[str, Gate] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "clamped": _clamped,
}


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("turns", [False, True], ids=["halves", "turns"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as it is", "transposed"])
@pytest.mark.parametrize("gate", _GATES)
def test_every_layout_and_activation_is_recognised(
    kernels: Kernels, gate: str, transposed: bool, turns: bool, biased: bool
) -> None:
    # With 16 = 32 / 2 the shapes do not say which way round the weights are.
    for inner in (INNER, DIM // 2):
        module = _Experts(_GATES[gate], transposed, turns, biased, inner)
        native = _replaced(kernels, module)
        assert isinstance(native, NativeExperts)
        x = _random(33, DIM) * 3
        chosen, weights = _choices(33, 3)
        torch.testing.assert_close(native(x, chosen, weights), module(x, chosen, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "gate",
    [
        lambda gate, up: F.gelu(gate) * up,  # erf's
        lambda gate, up: F.silu(gate.clamp(max=100)) * up.clamp(-100, 100),  # no normed row reaches that
        lambda gate, up: F.relu(gate) * up,
        lambda gate, up: F.silu(up) * gate,
        partial(_clamped, limit=10.0),
    ],
    ids=["erf", "cut far away", "relu", "the other half", "cut at ten"],
)
def test_what_the_kernel_does_not_compute_stays(kernels: Kernels, gate: Gate) -> None:
    module = _Experts(gate, transposed=False, turns=False, biased=False)
    assert _replaced(kernels, module) is module


@pytest.mark.parametrize("kind", ["exact", "int8"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_gpt_oss_agrees_with_transformers(kernels: Kernels, kind: str, bfloat16: bool) -> None:
    """Every number of choices, and rows so large that gates and ups are cut."""
    module = GptOssExperts(
        GptOssConfig(num_local_experts=8, hidden_size=64, intermediate_size=48, num_hidden_layers=1)
    ).requires_grad_(False)
    module.config._experts_implementation = "eager"
    for seed, parameter in enumerate(module.parameters()):
        numbers = _random(*parameter.shape, seed=seed) * (0.2 if parameter.dim() == 3 else 1.0)
        parameter.copy_(numbers.bfloat16() if bfloat16 else numbers)
    native = _replaced(kernels, module, kind)
    assert isinstance(native, NativeExperts)
    for choices in range(1, 9):
        for rows in (1, 2, 5, 70):
            for size in (1e-3, 1.0, 30.0, 1e5):
                x = _random(rows, 64, seed=choices) * size
                chosen, weights = _choices(rows, choices, 8)
                right = module(x, router_indices=chosen, routing_weights=weights)
                mine = native(x, router_indices=chosen, routing_weights=weights)
                off = (mine - right).abs()
                if kind == "exact":
                    assert (off.amax(-1) <= 1e-5 * right.abs().amax(-1)).all(), (choices, rows, size)
                elif size <= 1:  # beyond, where a large gate is near 0, a rounded input turns its sign
                    assert off.mean() <= 0.1 * right.abs().mean(), (choices, rows, size)
                assert torch.equal(native(x[-1:], chosen[-1:], weights[-1:]), mine[-1:])


def test_llama_4s_experts_are_given_a_row_each(kernels: Kernels) -> None:
    module = Llama4TextExperts(Llama4TextConfig(num_local_experts=4, hidden_size=32, intermediate_size=24))
    module.requires_grad_(False)
    for seed, parameter in enumerate(module.parameters()):
        parameter.copy_(_random(*parameter.shape, seed=seed) * 0.2)
    native = _replaced(kernels, module)
    assert isinstance(native, NativeExperts)
    x = _random(4 * 7, 32)
    x[torch.arange(28) % 3 > 0] = 0  # not chosen
    torch.testing.assert_close(native(x), module(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(native(x.view(4, 7, 32)[:, 2:3].reshape(4, 32)), native(x).view(4, 7, 32)[:, 2])
    x[5] = float("nan")
    out = native(x)
    assert out[5].isnan().any()
    assert out[torch.arange(28) != 5].isfinite().all()


def test_a_choice_of_one_expert_and_a_single_expert_are_mixtures(kernels: Kernels) -> None:
    module = _Experts(_GATES["silu"], False, False, False)
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, nn.Parameter(getattr(module, name)[:1].clone(), requires_grad=False))
    native = _replaced(kernels, module)
    assert isinstance(native, NativeExperts)
    x, first, one = _random(3, DIM), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.float32)
    both = x @ module.gate_up_proj[0].T
    right = (F.silu(both[:, :INNER]) * both[:, INNER:]) @ module.down_proj[0].T
    torch.testing.assert_close(native(x, first, one), right, rtol=1e-4, atol=1e-5)

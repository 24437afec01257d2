"""Modules are recognised by what they compute, replaced without changing more than rounding, and given back."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.checkpoints.packed_layers import round_layers
from engine.compute.cuda.modules import Replaced, RowGatedMLP, RowLinear, RowNorm, replace_modules
from engine.compute.cuda.reference import TorchOperations
from engine.errors import LoadError

TOKENS = torch.tensor([[5, 9, 300, 44, 12, 7]])
EXPECTED = {  # linear layers, norms, gated feed-forward parts, of two layers
    "qwen3": (15, 9, 2),
    "llama": (15, 5, 2),
    "gemma3_text": (15, 13, 0),
    "phi3": (9, 5, 2),
    "gemma2": (15, 9, 0),
    "mistral": (15, 5, 2),
    "gpt2": (9, 0, 0),
}
"""Gemma's activation is GELU, GPT-2's norms have a mean: those stay as they are."""


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**tiny_models.COMMON, **tiny_models.FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name and "gemma" not in family else 0.0, 0.1)
    return model


def replace(model: Any) -> Replaced:
    return replace_modules(model, TorchOperations(), lambda _: None)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", EXPECTED)
def test_replaced_modules_compute_the_same(family: str) -> None:
    model = make(family)
    before = logits(model)
    replaced = replace(model)
    counts = tuple(replaced.counts.get(kind, 0) for kind in ("linears", "norms", "gated"))
    assert counts == EXPECTED[family]
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3"])
def test_narrow_dtypes_are_recognised_and_logits_leave_in_float32(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    before = logits(model).float()
    replaced = replace(model)
    assert tuple(replaced.counts.get(kind, 0) for kind in ("linears", "norms", "gated")) == EXPECTED[family]
    after = logits(model)
    assert after.dtype == torch.float32
    assert not torch.equal(after.to(dtype).float(), after), "rounded on the way"
    assert float((after - before).abs().max()) < 0.05 * float(before.abs().max())


@pytest.mark.parametrize("family", EXPECTED)
def test_a_model_is_given_its_own_modules_back(family: str) -> None:
    model = make(family)
    before, weights = logits(model), {name: p.clone() for name, p in model.state_dict().items()}
    replace(model).undo()
    assert not any(isinstance(module, RowLinear | RowNorm | RowGatedMLP) for module in model.modules())
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(logits(model), before)


def test_joined_weights_are_held_once() -> None:
    model = make("llama")
    replace(model)
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    storages = {part.packed.data.untyped_storage().data_ptr() for part in parts}
    assert len(storages) == 1
    assert parts[0].shared[0].packed.data.untyped_storage().data_ptr() in storages
    assert parts[1].weight.shape == (32, 64)


def test_a_weight_that_is_turned_is_held_once() -> None:
    """GPT-2's layers are `[in, out]`: their own weight becomes a view of the kernel's."""
    model = make("gpt2")
    own = model.transformer.h[0].mlp.c_fc
    replaced = replace(model)
    ours = model.transformer.h[0].mlp.c_fc
    assert isinstance(ours, RowLinear)
    assert own.weight.data_ptr() == ours.packed.data.data_ptr()
    replaced.undo()
    assert model.transformer.h[0].mlp.c_fc is own


def test_a_tied_head_is_held_once() -> None:
    model = make("qwen3")
    replace(model)
    assert model.lm_head.packed.data.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("int4", 0.4)])
def test_rounded_weights_stay_close_and_are_given_back_rounded(kind: str, bound: float) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", **{**tiny_models.COMMON, **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    whole = logits(model)
    round_layers(model, kind, "tiny", lambda _: None)
    rounded = logits(model)
    assert 0 < float((rounded - whole).norm() / whole.norm()) < bound
    replaced = replace(model)
    kinds = {module.packed.kind for module in model.modules() if isinstance(module, RowLinear)}
    assert kinds == {"exact", kind}, "the head is not rounded"
    assert model.lm_head.packed.kind == "exact"
    assert replaced.counts == {"linears": 15, "norms": 5, "gated": 2}
    torch.testing.assert_close(logits(model), rounded, rtol=1e-4, atol=1e-4)
    replaced.undo()
    assert torch.equal(logits(model), rounded)


def test_a_weight_that_cannot_be_rounded_is_named() -> None:
    with pytest.raises(LoadError, match=r"tiny: quantization: int4 cannot be used: down_proj: .* 96 columns"):
        round_layers(make("llama"), "int4", "tiny", lambda _: None)


class OtherNorm(nn.Module):
    """Looks like an RMS norm and is none: it takes the mean off first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class OtherGate(nn.Module):
    """Looks like a gated part and is none: its output is halved."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj
        self.act_fn = inner.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / 2
        return out


def test_what_only_looks_alike_stays() -> None:
    model = make("llama")
    model.model.norm = OtherNorm()
    model.model.layers[0].mlp = OtherGate(model.model.layers[0].mlp)
    before = logits(model)
    replaced = replace(model)
    assert replaced.counts == {"linears": 15, "norms": 4, "gated": 1}
    assert isinstance(model.model.norm, OtherNorm)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", [0, 2, 4])
def test_an_operation_that_raises_leaves_the_model_as_it_was(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, left = make("llama"), iter(range(calls))
    before = logits(model)
    real = TorchOperations.rms_norm

    def fails(*given: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no shared memory")
        return real(*given)

    monkeypatch.setattr(TorchOperations, "rms_norm", fails)
    with pytest.raises(torch.OutOfMemoryError):
        replace(model)
    monkeypatch.undo()
    assert not any(isinstance(module, RowLinear | RowNorm | RowGatedMLP) for module in model.modules())
    assert torch.equal(logits(model), before)

"""Decoder layers and tiny models that kernels compute, for tests of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny_models
import torch
from grouped_weights import KINDS, groups_of
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.compute.attention import IMPLEMENTATION, attention_through, register_attention
from engine.compute.backend import PackedChunk
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.experts import replace_experts
from engine.compute.cpu.layers.layer_kernel import LayerParts, NormParts
from engine.compute.cpu.layers.own_weights import pack_own_weights
from engine.compute.cpu.layers.pointwise import replace_pointwise
from engine.compute.cpu.linear import NativeLinear, merge_shared_projections
from engine.compute.cpu.packed_weight import PackedWeight
from engine.compute.discovery import discover
from engine.compute.linear import pack_model

__all__ = ["layer_cache", "layer_parts", "length_of", "logits_of", "packed_model", "random_numbers"]


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer_parts(kernels: Kernels, kind: str, **given: Any) -> LayerParts:
    """A layer of 40 dimensions: 4 query heads of 20, 2 key heads, values of 16. `grouped`: all are stored otherwise."""

    def weight(columns: int, depth: int, seed: int, biased: bool = False) -> PackedWeight:
        if kind == "grouped":  # bits, groups, scales, zeros and minima of each weight are others
            bits, group, of = (4, 5, 6, 8)[seed % 4], (32, 16, 64, 128)[seed % 4], KINDS[seed % len(KINDS)]
            return kernels.pack_groups(groups_of(bits, group, of, columns, depth), None)
        numbers = random_numbers(columns, depth, seed=seed) * depth**-0.5
        numbers = numbers.bfloat16().float() if kind == "bfloat16" else numbers
        bias = random_numbers(columns, seed=seed) if biased else None
        return kernels.pack(numbers, bias, "int8" if kind == "int8" else "exact")

    fields: dict[str, Any] = {
        "input_norm": NormParts(random_numbers(40), 1e-6),
        "mlp_norm": NormParts(random_numbers(40, seed=1), 1e-5),
        "query_norm": NormParts(random_numbers(20), 1e-6),
        "key_norm": NormParts(random_numbers(20, seed=1), 1e-5),
        "qkv": (weight(80, 40, 1, biased=True), weight(40, 40, 2), weight(32, 40, 3)),
        "o": weight(40, 64, 4),
        "gate_up": (weight(72, 40, 5), weight(72, 40, 6)),
        "down": weight(40, 72, 7),
        "heads": 4,
        "kv_heads": 2,
        "key_dim": 20,
        "value_dim": 16,
        "rotary": 20,
        "scale": 0.2,
    }
    if given.pop("merged", False):
        fields |= {"qkv": (weight(152, 40, 8, biased=True),), "gate_up": (weight(144, 40, 9, biased=True),)}
    return LayerParts(**{**fields, **given})


def layer_cache(parts: LayerParts, slots: int = 96) -> tuple[Tensor, Tensor]:
    return torch.zeros(parts.kv_heads, slots, parts.key_dim), torch.zeros(parts.kv_heads, slots, parts.value_dim)


def packed_model(kernels: Kernels, family: str, kind: str = "exact", **config: Any) -> Any:
    """Ready for `fuse_layers`, as the loader does it."""
    known = tiny_models.FAMILIES.get(family, {})
    torch.manual_seed(3)
    settings = AutoConfig.for_model(family, **{**tiny_models.COMMON, **known, **config})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.copy_((torch.randn(parameter.shape) * 0.2).bfloat16())
    pack_model(model, make=partial(NativeLinear, kernels, kind))
    make, exact = (partial(NativeLinear, kernels, k) for k in (kind, "exact"))
    replace_experts(model, kernels, make, exact)
    pack_own_weights(model, kernels, make, exact)
    replace_pointwise(model, kernels)
    merge_shared_projections(model)
    return model


def length_of(model: nn.Module) -> int:
    return int(getattr(model.config, "max_position_embeddings", 0) or 2048)


def logits_of(model: nn.Module, kernels: Kernels, positions: Tensor) -> list[Tensor]:
    """Of a prompt of 19 tokens and of one more, through the block cache."""
    register_attention()
    own = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    cache = CpuCache(discover(model, 2048).shapes(), 3, kernels)
    out = []
    with torch.inference_mode():
        for start, count in ((0, 19), (19, 1)):
            plan = CpuPlan(kernels, cache, [PackedChunk(0, count, start, (2, 1))])
            tokens = torch.arange(start, start + count)[None] * 7 % 400
            part = positions[None, start : start + count]
            with attention_through(plan):
                out.append(model(tokens, position_ids=part, use_cache=False).logits)
    model.set_attn_implementation(own)  # type: ignore[operator]
    return out

"""A decoder layer as one kernel: the bits of its parts, whatever is computed beside it; and only where it is one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.compute.attention import IMPLEMENTATION, attention_through, register_attention
from engine.compute.backend import PackedChunk
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.decoder_layer import NativeLayer, fuse_layers
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layer_kernel import LayerParts, NormParts
from engine.compute.cpu.linear import NativeLinear, merge_shared_projections
from engine.compute.cpu.packed_weight import PackedWeight
from engine.compute.cpu.pointwise import replace_pointwise
from engine.compute.discovery import discover
from engine.compute.linear import pack_model


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# -- the kernel ------------------------------------------------------------------------------------------------------


def _parts(kernels: Kernels, kind: str, **given: Any) -> LayerParts:
    """A layer of 40 dimensions: 4 query heads of 20, 2 key heads, values of 16."""

    def weight(columns: int, depth: int, seed: int, biased: bool = False) -> PackedWeight:
        numbers = _random(columns, depth, seed=seed) * depth**-0.5
        numbers = numbers.bfloat16().float() if kind == "bfloat16" else numbers
        bias = _random(columns, seed=seed) if biased else None
        return kernels.pack(numbers, bias, "int8" if kind == "int8" else "exact")

    fields: dict[str, Any] = {
        "first_norm": NormParts(_random(40), 1e-6),
        "second_norm": NormParts(_random(40, seed=1), 1e-5),
        "query_norm": NormParts(_random(20), 1e-6),
        "key_norm": NormParts(_random(20, seed=1), 1e-5),
        "q": weight(80, 40, 1, biased=True),
        "k": weight(40, 40, 2),
        "v": weight(32, 40, 3),
        "o": weight(40, 64, 4),
        "gate": weight(72, 40, 5),
        "up": weight(72, 40, 6),
        "down": weight(40, 72, 7),
        "heads": 4,
        "kv_heads": 2,
        "rotary": 20,
        "scale": 0.2,
    }
    return LayerParts(**{**fields, **given})


def _one_by_one(
    kernels: Kernels, p: LayerParts, plan: AttentionPlan, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, ...]
) -> Tensor:
    """The formula of `LayerParts`, with the kernels that a model's modules would call, and torch in between."""
    rows = x.shape[0]

    def rotated(x: Tensor) -> Tensor:
        part, rest = x[..., : p.rotary], x[..., p.rotary :]
        low, high = part.chunk(2, dim=-1)
        return torch.cat([part * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None], rest], -1)

    def product(weight: PackedWeight, x: Tensor) -> Tensor:
        return kernels.group([weight])(x)[0]

    def normed(norm: NormParts | None, x: Tensor) -> Tensor:
        return x if norm is None else kernels.rms_norm(x, norm.weight, norm.epsilon)

    n = normed(p.first_norm, x)
    query = rotated(normed(p.query_norm, product(p.q, n).view(rows, p.heads, p.key_dim)))
    key = rotated(normed(p.key_norm, product(p.k, n).view(rows, p.kv_heads, p.key_dim)))
    value = product(p.v, n).view(rows, p.kv_heads, p.value_dim)
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    mixed = kernels.attend(
        plan, query, key, value, *cache, scale=p.scale, window=p.window, softcap=p.softcap, sinks=p.sinks
    )
    y = x + product(p.o, mixed.reshape(rows, -1))
    m = normed(p.second_norm, y)
    return y + product(p.down, kernels.silu(product(p.gate, m)) * product(p.up, m))


def _cache(parts: LayerParts, slots: int = 96) -> tuple[Tensor, Tensor]:
    return torch.zeros(parts.kv_heads, slots, parts.key_dim), torch.zeros(parts.kv_heads, slots, parts.value_dim)


_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"query_norm": None, "key_norm": None},
    {"rotary": 0},
    {"rotary": 12},
    {"window": 7},
    {"softcap": 3.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("variant", _VARIANTS, ids=lambda v: ", ".join(v) or "plain")
def test_the_bits_are_those_of_its_parts(kernels: Kernels, kind: str, variant: dict[str, Any]) -> None:
    parts = _parts(kernels, kind, **variant)
    layer = kernels.layer(parts)
    x, cos, sin = _random(23, 40), _random(23, parts.rotary), _random(23, parts.rotary, seed=1)
    one, other = _cache(parts), _cache(parts)

    def plan() -> AttentionPlan:  # two sequences of 14 and 7 tokens, and two rows of padding
        slots = torch.tensor([*range(32, 46), *range(70, 77)])
        return AttentionPlan([(0, 14, 0, [2]), (14, 7, 6, [4])], slots)

    expected = _one_by_one(kernels, parts, plan(), x, cos, sin, one)
    assert torch.equal(layer(plan(), x, cos, sin, *other), expected)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["bfloat16", "float32", "int8"]),
    cuts=st.lists(st.integers(1, 39), max_size=5, unique=True),
    threads=st.sampled_from([1, 2, 3, 5, 9]),
)
def test_how_a_sequence_is_cut_does_not_matter(kernels: Kernels, kind: str, cuts: list[int], threads: int) -> None:
    parts = _parts(kernels, kind)
    layer = kernels.layer(parts)
    x, cos, sin = _random(40, 40), _random(40, 20), _random(40, 20, seed=1)

    def run(borders: list[int]) -> Tensor:
        cache, out = _cache(parts), []
        for start, stop in zip([0, *borders], [*borders, 40], strict=True):
            plan = AttentionPlan([(0, stop - start, start, [3, 0, 5])], torch.tensor(_slots(start, stop)))
            out.append(layer(plan, x[start:stop], cos[start:stop], sin[start:stop], *cache))
        return torch.cat(out)

    def _slots(start: int, stop: int) -> list[int]:
        return [[3, 0, 5][i // 16] * 16 + i % 16 for i in range(start, stop)]

    whole, before = run([]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run(sorted(cuts)), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 13, 64])
def test_who_computes_which_piece_does_not_matter(kernels: Kernels, kind: str, rows: int) -> None:
    """A layer of a small model's size: the ones above are too small for most phases to be divided."""
    dim, inner, heads = 320, 1100, 5

    def weight(columns: int, depth: int) -> PackedWeight:
        numbers = _random(columns, depth) * depth**-0.5
        return kernels.pack(
            numbers.bfloat16().float() if kind == "bfloat16" else numbers, None, "int8" if kind == "int8" else "exact"
        )

    parts = LayerParts(
        first_norm=NormParts(_random(dim), 1e-6), second_norm=NormParts(_random(dim, seed=1), 1e-6),
        query_norm=None, key_norm=None,
        q=weight(heads * 64, dim), k=weight(64, dim), v=weight(64, dim), o=weight(dim, heads * 64),
        gate=weight(inner, dim), up=weight(inner, dim), down=weight(dim, inner),
        heads=heads, kv_heads=1, rotary=64, scale=0.125,
    )  # fmt: skip
    layer = kernels.layer(parts)
    x, cos, sin = _random(rows, dim), _random(rows, 64), _random(rows, 64, seed=1)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 4, 5, 6, 7, 8, 9) * 2:
            torch.set_num_threads(threads)
            cache = _cache(parts)
            plan = AttentionPlan([(0, rows, 0, [3, 0, 5, 1])], torch.tensor(_slots_of([3, 0, 5, 1], rows)))
            out = layer(plan, x, cos, sin, *cache)
            found.add(b"".join(bytes(t.numpy().data) for t in (out, *cache)))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def _slots_of(table: list[int], count: int) -> list[int]:
    return [table[i // 16] * 16 + i % 16 for i in range(count)]


@pytest.mark.slow
def test_a_layer_has_the_same_bits_with_every_instruction_set(kernels: Kernels, other_kernels: Kernels) -> None:
    x, cos, sin = _random(23, 40), _random(23, 20), _random(23, 20, seed=1)
    for kind in ("bfloat16", "float32", "int8"):
        found = []
        for k in (kernels, other_kernels):
            parts = _parts(k, kind)
            cache = _cache(parts)
            plan = AttentionPlan([(0, 21, 6, [2, 4])], torch.tensor(_slots_of([2, 4], 27)[6:]))
            found.append((k.layer(parts)(plan, x, cos, sin, *cache), *cache))
        assert all(map(torch.equal, *found)), kind


def test_a_row_that_is_not_finite_is_noted_and_hurts_nobody(kernels: Kernels) -> None:
    parts = _parts(kernels, "bfloat16")
    layer = kernels.layer(parts)
    x, cos, sin = _random(10, 40), _random(10, 20), _random(10, 20, seed=1)
    sick = x.clone()
    sick[2, 3] = float("nan")

    def run(x: Tensor) -> tuple[Tensor, AttentionPlan, tuple[Tensor, ...]]:
        plan, cache = (
            AttentionPlan([(0, 5, 0, [0]), (5, 5, 0, [1])], torch.tensor([*range(5), *range(16, 21)])),
            _cache(parts),
        )
        return layer(plan, x, cos, sin, *cache), plan, cache

    (clean, _, _), (out, plan, cache) = run(x), run(sick)
    assert plan.finite.tolist() == [True, True, False] + [True] * 7
    assert all(t.isfinite().all() for t in cache)
    assert torch.equal(out[5:], clean[5:])
    assert torch.equal(out[:2], clean[:2])
    assert out[2].isnan().any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotary": 22},
        {"rotary": 7},
        {"heads": 8},
        {"query_norm": NormParts(torch.ones(21), 1e-6)},
        {"second_norm": NormParts(torch.ones(39), 1e-6)},
        {"sinks": torch.zeros(3)},
    ],
    ids=lambda w: next(iter(w)),
)
def test_parts_that_do_not_fit_are_refused(kernels: Kernels, wrong: dict[str, Any]) -> None:
    parts = _parts(kernels, "bfloat16", **wrong)
    assert not kernels.can_compute(parts)
    with pytest.raises(ValueError, match="no layer that there is a kernel for"):
        kernels.layer(parts)


def test_rows_without_a_position_are_refused(kernels: Kernels) -> None:
    parts = _parts(kernels, "bfloat16")
    plan = AttentionPlan([(0, 3, 0, [0])], torch.arange(3))
    with pytest.raises(ValueError, match="3 rows with 2 positions"):
        kernels.layer(parts)(plan, _random(3, 40), _random(2, 20), _random(2, 20), *_cache(parts))
    with pytest.raises(ValueError, match="2 rows with 2 positions, 3 of which have a place"):
        kernels.layer(parts)(plan, _random(2, 40), _random(2, 20), _random(2, 20), *_cache(parts))


@pytest.mark.parametrize("size", [1, 7, 8, 100, 20_000])
def test_silu_is_what_it_says_and_each_number_is_alone(kernels: Kernels, size: int) -> None:
    x = _random(size) * 8
    out = kernels.silu(x)
    torch.testing.assert_close(out, F.silu(x.double()).float(), rtol=3e-6, atol=1e-30)
    assert torch.equal(kernels.silu(x[size // 2 :]), out[size // 2 :])
    assert torch.equal(kernels.silu(x[size // 2 : size // 2 + 1]), out[size // 2 : size // 2 + 1])


def test_silu_at_the_ends(kernels: Kernels) -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1e30, 1e30, float("inf"), float("nan"), -float("inf")])
    out = kernels.silu(x)
    assert torch.equal(out[:6], torch.tensor([0.0, -0.0, 0.0, 0.0, 1e30, float("inf")]))
    assert out[6:].isnan().all()


# -- whole models ----------------------------------------------------------------------------------------------------


def _model(kernels: Kernels, family: str, kind: str = "exact", **config: Any) -> Any:
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
    replace_pointwise(model, kernels)
    merge_shared_projections(model)
    return model


def _length(model: nn.Module) -> int:
    return int(getattr(model.config, "max_position_embeddings", 0) or 2048)


def _logits(model: nn.Module, kernels: Kernels, positions: Tensor) -> list[Tensor]:
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


@pytest.mark.parametrize("kind", ["exact", "int8"])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", {}),
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 48}),
        ("qwen2", {}),
        ("mistral", {}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("granite", {}),
        ("ministral3", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else ", ".join(v),
)
def test_layers_of_the_usual_kind_run_as_one_and_keep_their_bits(
    kernels: Kernels, family: str, config: dict[str, Any], kind: str
) -> None:
    model = _model(kernels, family, kind, **config)
    positions = torch.tensor([*range(18), 1000, 2047])
    before = _logits(model, kernels, positions)
    plain = model(torch.arange(5)[None], use_cache=False).logits
    assert fuse_layers(model, kernels, _length(model)) == 2
    assert sum(isinstance(module, NativeLayer) for module in model.modules()) == 2
    for one, other in zip(_logits(model, kernels, positions), before, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(model(torch.arange(5)[None], use_cache=False).logits, plain), (
        "without a block cache, the modules"
    )


@pytest.mark.parametrize(("head_dim", "lanes"), [(8, 8), (24, 8), (16, 16), (48, 16)])
def test_a_head_of_whole_vectors_becomes_part_of_one(kernels: Kernels, head_dim: int, lanes: int) -> None:
    """lanes: the widest vectors that the head's dimensions fill. With wider ones (AVX-512) the modules do the work."""
    model = _model(kernels, "llama", head_dim=head_dim)
    positions = torch.arange(20)
    before = _logits(model, kernels, positions)
    assert fuse_layers(model, kernels, _length(model)) == (2 if kernels.lanes <= lanes else 0)
    for one, other in zip(_logits(model, kernels, positions), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma3_text", {}),  # norms after attention and MLP, too
        ("phi3", {}),  # q, k and v in one weight
        ("olmo2", {}),  # norms after, none before
        ("glm4", {"head_dim": 16}),  # pairs of neighbours are rotated
        ("granite", {"residual_multiplier": 0.5}),
        ("ministral3", {"max_position_embeddings": 65536}),  # queries grow with the position, beyond 16,384
        ("llama", {"hidden_act": "gelu"}),
        ("gpt2", {}),
        ("gpt_oss", {}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
    ],
    ids=lambda v: v if isinstance(v, str) else ", ".join(v),
)
def test_other_layers_stay_as_they_are(kernels: Kernels, family: str, config: dict[str, Any]) -> None:
    model = _model(kernels, family, **config)
    positions = torch.arange(20)
    before = _logits(model, kernels, positions)
    own = model.config._attn_implementation
    assert fuse_layers(model, kernels, _length(model)) == 0
    assert model.config._attn_implementation == own
    for one, other in zip(_logits(model, kernels, positions), before, strict=True):
        assert torch.equal(one, other)


def test_a_model_that_cannot_be_called_so_stays_as_it_is(kernels: Kernels) -> None:
    for family in ("bloom", "mamba"):
        model = _model(kernels, family)
        plain = model(torch.arange(5)[None]).logits
        assert fuse_layers(model, kernels, _length(model)) == 0
        assert torch.equal(model(torch.arange(5)[None]).logits, plain)


def test_a_layer_answers_for_what_it_replaced(kernels: Kernels) -> None:
    """Models ask their layers which attention they use, to choose a mask."""
    model = _model(kernels, "qwen2")
    kinds = [layer.hidden_size for layer in model.model.layers]
    fuse_layers(model, kernels, _length(model))
    assert [layer.hidden_size for layer in model.model.layers] == kinds
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.model.layers[0].no_such_thing

"""A decoder layer as one kernel: the bits of its parts, whatever is computed beside it; and only where it is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from layer_models import layer_cache, layer_parts, length_of, logits_of, packed_model, random_numbers
from torch import Tensor

from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.decoder_layer import NativeLayer, fuse_layers
from engine.compute.cpu.layers.layer_kernel import LayerParts, NormParts
from engine.compute.cpu.packed_weight import PackedWeight

# -- the kernel ------------------------------------------------------------------------------------------------------


def _one_by_one(
    kernels: Kernels, p: LayerParts, plan: AttentionPlan, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, ...]
) -> Tensor:
    """The formula of `LayerParts`, with the kernels that a model's modules would call, and torch in between."""
    rows = x.shape[0]

    def rotated(x: Tensor) -> Tensor:
        part, rest = x[..., : p.rotary], x[..., p.rotary :]
        c, s = cos[:, None], sin[:, None]
        if p.pairing == "halves_half":
            c, s = (torch.cat([t, t], -1) for t in (c, s))
        if p.pairing.startswith("halves"):
            low, high = part.chunk(2, dim=-1)
            return torch.cat([part * c + torch.cat([-high, low], -1) * s, rest], -1)
        if p.pairing == "neighbours_half":
            c, s = (t[..., : p.rotary // 2].repeat_interleave(2, dim=-1) for t in (c, s))
        even, odd = part[..., ::2], part[..., 1::2]
        return torch.cat([part * c + torch.stack([-odd, even], -1).flatten(-2) * s, rest], -1)

    def product(x: Tensor, *weights: PackedWeight) -> Tensor:
        return torch.cat([kernels.group([weight])(x)[0] for weight in weights], -1)

    def normed(norm: NormParts | None, x: Tensor) -> Tensor:
        return x if norm is None else kernels.norm(x, norm.weight, norm.epsilon, centred=norm.centred)

    def heads(norm: NormParts | None, x: Tensor, count: int) -> Tensor:
        split = x.reshape(rows, count, -1)
        return normed(norm, x).view_as(split) if p.whole else normed(norm, split)

    n = normed(p.input_norm, x)
    sizes = [p.heads * p.key_dim, p.kv_heads * p.key_dim, p.kv_heads * p.value_dim]
    q, k, v = (t.contiguous() for t in product(n, *p.qkv).split(sizes, -1))
    query, key = rotated(heads(p.query_norm, q, p.heads)), rotated(heads(p.key_norm, k, p.kv_heads))
    value = v.view(rows, p.kv_heads, p.value_dim)
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    mixed = kernels.attend(
        plan, query, key, value, *cache, scale=p.scale, window=p.window, softcap=p.softcap, sinks=p.sinks
    )
    y = x + normed(p.attention_norm, product(mixed.reshape(rows, -1), p.o)) * p.factor
    if p.down is None:
        return y
    m = n if p.parallel else normed(p.mlp_norm, y)
    gate, up = product(m, *p.gate_up).chunk(2, -1)
    return y + normed(p.output_norm, product(kernels.activate(gate, p.activation) * up, p.down)) * p.factor


_NORM = NormParts(random_numbers(40, seed=2), 1e-4)
_COHERE: dict[str, Any] = {"pairing": "neighbours", "query_norm": None, "key_norm": None}
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"query_norm": None, "key_norm": None},
    {"rotary": 0},
    {"rotary": 12},
    {"window": 7},
    {"softcap": 3.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    {"merged": True},  # Phi-3
    {
        "activation": "gelu_tanh",
        "attention_norm": _NORM,
        "output_norm": NormParts(random_numbers(40, seed=3), 1e-3),
    },  # Gemma
    {"factor": 0.22},  # Granite
    {"pairing": "halves_half", "gate_up": (), "down": None, "mlp_norm": None},  # gpt-oss, up to attention
    {"gate_up": (), "down": None, "mlp_norm": None, "attention_norm": _NORM, "factor": 0.5},
    {  # OLMo 2
        "input_norm": None,
        "mlp_norm": None,
        "attention_norm": _NORM,
        "output_norm": NormParts(random_numbers(40, seed=3), 1e-3),
        "query_norm": NormParts(random_numbers(80), 1e-6),
        "key_norm": NormParts(random_numbers(40, seed=1), 1e-5),
    },
    {"merged": True, "pairing": "neighbours_half", "rotary": 12, "attention_norm": _NORM, "output_norm": _NORM},  # GLM
    {"input_norm": NormParts(random_numbers(40), 1e-5, centred=True), "mlp_norm": None, "parallel": True} | _COHERE,
    {"input_norm": _NORM, "mlp_norm": None, "parallel": True, "merged": True, "factor": 0.5, "output_norm": _NORM},
)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "grouped"])
@pytest.mark.parametrize("variant", _VARIANTS, ids=lambda v: ", ".join(v) or "plain")
def test_the_bits_are_those_of_its_parts(kernels: Kernels, kind: str, variant: dict[str, Any]) -> None:
    parts = layer_parts(kernels, kind, **variant)
    layer = kernels.layer(parts)
    x, cos, sin = random_numbers(23, 40), random_numbers(23, parts.angles), random_numbers(23, parts.angles, seed=1)
    one, other = layer_cache(parts), layer_cache(parts)

    def plan() -> AttentionPlan:  # two sequences of 14 and 7 tokens, and two rows of padding
        slots = torch.tensor([*range(32, 46), *range(70, 77)])
        return AttentionPlan([(0, 14, 0, [2]), (14, 7, 6, [4])], slots)

    expected = _one_by_one(kernels, parts, plan(), x, cos, sin, one)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(layer(plan(), x, cos, sin, *other), expected)
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    finally:
        torch.set_num_threads(before)
    first = AttentionPlan([(0, 1, 0, [2])], torch.tensor([32]))
    assert torch.equal(layer(first, x[:1], cos[:1], sin[:1], *layer_cache(parts)), expected[:1]), "a row alone"


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["bfloat16", "float32", "int8", "grouped"]),
    cuts=st.lists(st.integers(1, 39), max_size=5, unique=True),
    threads=st.sampled_from([1, 2, 3, 5, 9]),
)
def test_how_a_sequence_is_cut_does_not_matter(kernels: Kernels, kind: str, cuts: list[int], threads: int) -> None:
    parts = layer_parts(kernels, kind)
    layer = kernels.layer(parts)
    x, cos, sin = random_numbers(40, 40), random_numbers(40, 20), random_numbers(40, 20, seed=1)

    def run(borders: list[int]) -> Tensor:
        cache, out = layer_cache(parts), []
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
@pytest.mark.parametrize(("rows", "merged"), [(1, False), (2, True), (13, False), (13, True), (64, True)])
def test_who_computes_which_piece_does_not_matter(kernels: Kernels, kind: str, rows: int, merged: bool) -> None:
    """A layer of a small model's size: the ones above are too small for most phases to be divided."""
    dim, inner, heads = 320, 1100, 5

    def weight(columns: int, depth: int) -> PackedWeight:
        numbers = random_numbers(columns, depth) * depth**-0.5
        return kernels.pack(
            numbers.bfloat16().float() if kind == "bfloat16" else numbers, None, "int8" if kind == "int8" else "exact"
        )

    parts = LayerParts(
        input_norm=NormParts(random_numbers(dim), 1e-6), mlp_norm=NormParts(random_numbers(dim, seed=1), 1e-6),
        output_norm=NormParts(random_numbers(dim, seed=2), 1e-6) if merged else None,
        qkv=(weight((heads + 2) * 64, dim),) if merged else (weight(heads * 64, dim), weight(64, dim), weight(64, dim)),
        o=weight(dim, heads * 64),
        gate_up=(weight(2 * inner, dim),) if merged else (weight(inner, dim), weight(inner, dim)),
        down=weight(dim, inner), activation="gelu_tanh" if merged else "silu", factor=0.5 if merged else 1.0,
        heads=heads, kv_heads=1, key_dim=64, value_dim=64, rotary=64, scale=0.125,
    )  # fmt: skip
    layer = kernels.layer(parts)
    x, cos, sin = random_numbers(rows, dim), random_numbers(rows, 64), random_numbers(rows, 64, seed=1)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 4, 5, 6, 7, 8, 9) * 2:
            torch.set_num_threads(threads)
            cache = layer_cache(parts)
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
    cases = [(kind, {}) for kind in ("bfloat16", "float32", "int8", "grouped")] + [
        ("float32", variant) for variant in _VARIANTS
    ]
    for kind, variant in cases:
        found = []
        for k in (kernels, other_kernels):
            parts = layer_parts(k, kind, **variant)
            x, cos, sin = (
                random_numbers(37, 40),
                random_numbers(37, parts.angles),
                random_numbers(37, parts.angles, seed=1),
            )
            cache = layer_cache(parts)
            plan = AttentionPlan([(0, 21, 6, [2, 4])], torch.tensor(_slots_of([2, 4], 27)[6:]))
            found.append((k.layer(parts)(plan, x, cos, sin, *cache), *cache))
        assert all(map(torch.equal, *found)), (kind, variant)


@pytest.mark.slow
def test_a_row_that_is_not_finite_is_noted_and_hurts_nobody(kernels: Kernels) -> None:
    parts = layer_parts(kernels, "bfloat16")
    layer = kernels.layer(parts)
    x, cos, sin = random_numbers(10, 40), random_numbers(10, 20), random_numbers(10, 20, seed=1)
    sick = x.clone()
    sick[2, 3] = float("nan")

    def run(x: Tensor) -> tuple[Tensor, AttentionPlan, tuple[Tensor, ...]]:
        plan, cache = (
            AttentionPlan([(0, 5, 0, [0]), (5, 5, 0, [1])], torch.tensor([*range(5), *range(16, 21)])),
            layer_cache(parts),
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
        {"mlp_norm": NormParts(torch.ones(39), 1e-6)},
        {"key_norm": NormParts(torch.ones(40), 1e-6)},  # of all heads, and queries of each
        {"parallel": True},  # with a norm of its own
        {"sinks": torch.zeros(3)},
    ],
    ids=lambda w: next(iter(w)),
)
def test_parts_that_do_not_fit_are_refused(kernels: Kernels, wrong: dict[str, Any]) -> None:
    parts = layer_parts(kernels, "bfloat16", **wrong)
    assert not kernels.can_compute(parts)
    with pytest.raises(ValueError, match="no layer that there is a kernel for"):
        kernels.layer(parts)


def test_rows_without_a_position_are_refused(kernels: Kernels) -> None:
    parts = layer_parts(kernels, "bfloat16")
    plan = AttentionPlan([(0, 3, 0, [0])], torch.arange(3))
    with pytest.raises(ValueError, match="3 rows with 2 positions"):
        kernels.layer(parts)(
            plan, random_numbers(3, 40), random_numbers(2, 20), random_numbers(2, 20), *layer_cache(parts)
        )
    with pytest.raises(ValueError, match="2 rows with 2 positions, 3 of which have a place"):
        kernels.layer(parts)(
            plan, random_numbers(2, 40), random_numbers(2, 20), random_numbers(2, 20), *layer_cache(parts)
        )


def _gelu(x: Tensor) -> Tensor:
    """In a form that loses nothing where 1 + tanh is almost 0."""
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


_RIGHT = {"silu": F.silu, "gelu_tanh": _gelu}


@pytest.mark.parametrize("kind", _RIGHT)
@pytest.mark.parametrize("size", [1, 7, 8, 100, 20_000])
def test_an_activation_is_what_it_says_and_each_number_is_alone(kernels: Kernels, kind: str, size: int) -> None:
    x = random_numbers(size) * (8 if kind == "silu" else 2)
    out = kernels.activate(x, kind)
    torch.testing.assert_close(out, _RIGHT[kind](x.double()).float(), rtol=1e-5, atol=1e-30)
    if kind == "gelu_tanh":
        torch.testing.assert_close(out, F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    assert torch.equal(kernels.activate(x[size // 2 :], kind), out[size // 2 :])
    assert torch.equal(kernels.activate(x[size // 2 : size // 2 + 1], kind), out[size // 2 : size // 2 + 1])


@pytest.mark.parametrize("kind", _RIGHT)
def test_an_activation_at_the_ends(kernels: Kernels, kind: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1e30, 1e30, float("inf"), float("nan"), -float("inf")])
    out = kernels.activate(x, kind)
    assert torch.equal(out[:2], torch.tensor([0.0, -0.0]))
    assert torch.equal(out[3:6], torch.tensor([0.0, 1e30, float("inf")]))
    assert out[2] <= 1e-45
    assert out[6:].isnan().all()


def test_a_norm_takes_the_mean_off_if_it_is_centred(kernels: Kernels) -> None:
    for dim in (5, 16, 40, 1000):
        x, weight = random_numbers(7, dim) + 3, random_numbers(dim)
        out = kernels.norm(x, weight, 1e-5, centred=True)
        right = F.layer_norm(x.double(), (dim,), weight.double(), None, 1e-5).float()
        torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)
        assert torch.equal(kernels.norm(x[2:3], weight, 1e-5, centred=True), out[2:3])


# -- whole models ----------------------------------------------------------------------------------------------------


_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16}
_HALF: dict[str, dict[str, Any]] = {
    "qwen3_moe": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "granitemoe": {"num_local_experts": 4, "residual_multiplier": 0.22},
    "gpt_oss": {},
}
"""Families whose layers' first halves run as one, up to attention: the MLP is another."""


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
        ("phi3", {}),  # q, k and v in one weight, gate and up in another
        ("gemma", {"head_dim": 16}),
        ("gemma2", {}),  # norms before and after, GELU, soft-capped scores
        ("gemma3_text", {}),
        ("granite", {"residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 12.0}),
        ("olmo2", {}),  # norms after, none before; queries and keys normed over all heads
        ("olmo3", {"sliding_window": 24}),
        ("glm", {"head_dim": 16}),  # pairs of neighbours are rotated, half of a head
        ("glm4", {"head_dim": 16}),
        ("cohere", {}),  # attention and MLP side by side, after one LayerNorm
        ("cohere2", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
        ("ernie4_5", {}),
        ("llama", {"hidden_act": "gelu"}),  # erf's, of which there is no kernel
        *((family, config) for family, config in _HALF.items()),
    ],
    ids=lambda v: v if isinstance(v, str) else ", ".join(v),
)
def test_layers_of_the_usual_kind_run_as_one_and_keep_their_bits(
    kernels: Kernels, family: str, config: dict[str, Any], kind: str
) -> None:
    model = packed_model(kernels, family, kind, **config)
    positions = torch.tensor([*range(18), 1000, 2047])
    before = logits_of(model, kernels, positions)
    plain = model(torch.arange(5)[None], use_cache=False).logits
    assert fuse_layers(model, kernels, length_of(model)) == 2
    layers = [module for module in model.modules() if isinstance(module, NativeLayer)]
    assert [layer.rest is not None for layer in layers] == [family in _HALF or config.get("hidden_act") == "gelu"] * 2
    for one, other in zip(logits_of(model, kernels, positions), before, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(model(torch.arange(5)[None], use_cache=False).logits, plain), (
        "without a block cache, the modules"
    )


@pytest.mark.parametrize(("head_dim", "lanes"), [(8, 8), (24, 8), (16, 16), (48, 16)])
def test_a_head_of_whole_vectors_becomes_part_of_one(kernels: Kernels, head_dim: int, lanes: int) -> None:
    """lanes: the widest vectors that the head's dimensions fill. With wider ones (AVX-512) the modules do the work."""
    model = packed_model(kernels, "llama", head_dim=head_dim)
    positions = torch.arange(20)
    before = logits_of(model, kernels, positions)
    assert fuse_layers(model, kernels, length_of(model)) == (2 if kernels.lanes <= lanes else 0)
    for one, other in zip(logits_of(model, kernels, positions), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("cohere", {"use_qk_norm": True}),  # queries and keys normed with weights of each head
        ("ministral3", {"max_position_embeddings": 65536}),  # queries grow with the position, beyond 16,384
        ("gpt2", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else ", ".join(v),
)
def test_other_layers_stay_as_they_are(kernels: Kernels, family: str, config: dict[str, Any]) -> None:
    model = packed_model(kernels, family, **config)
    positions = torch.arange(20)
    before = logits_of(model, kernels, positions)
    own = model.config._attn_implementation
    assert fuse_layers(model, kernels, length_of(model)) == 0
    assert model.config._attn_implementation == own
    for one, other in zip(logits_of(model, kernels, positions), before, strict=True):
        assert torch.equal(one, other)


def test_a_model_that_cannot_be_called_so_stays_as_it_is(kernels: Kernels) -> None:
    for family in ("bloom", "mamba"):
        model = packed_model(kernels, family)
        plain = model(torch.arange(5)[None]).logits
        assert fuse_layers(model, kernels, length_of(model)) == 0
        assert torch.equal(model(torch.arange(5)[None]).logits, plain)


def test_a_layer_answers_for_what_it_replaced(kernels: Kernels) -> None:
    """Models ask their layers which attention they use, to choose a mask."""
    model = packed_model(kernels, "qwen2")
    kinds = [layer.hidden_size for layer in model.model.layers]
    fuse_layers(model, kernels, length_of(model))
    assert [layer.hidden_size for layer in model.model.layers] == kinds
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.model.layers[0].no_such_thing

"""Layers that follow one another as one call: the bits of each by itself, and only where nothing stands between."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from layer_models import layer_cache, layer_parts, length_of, logits_of, packed_model, random_numbers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.compute.attention import IMPLEMENTATION, register_attention
from engine.compute.attention_mask import NotUnderstood
from engine.compute.backend import PackedChunk
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.decoder_layer import NativeLayer, fuse_layers
from engine.compute.cpu.layers.layer_kernel import LayerKernel, LayerParts, LayerStack
from engine.compute.cpu.layers.layer_reading import Watched
from engine.compute.cpu.layers.stack import runs_of_layers
from engine.compute.discovery import discover


def _plan() -> AttentionPlan:
    """Two sequences of 14 and 7 tokens; two more rows are padding."""
    slots = torch.tensor([*range(32, 46), *range(70, 77)])
    return AttentionPlan([(0, 14, 0, [2]), (14, 7, 6, [4])], slots)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "grouped"])
def test_a_stack_has_the_bits_of_its_layers(kernels: Kernels, kind: str, count: int) -> None:
    """Layers of several kinds, so that each needs scratch of its own size; one of them is not rotated."""
    given: list[dict[str, Any]] = [{}, {"rotary": 0}, {"window": 7}, {"merged": True}, {"activation": "gelu_tanh"}]
    parts = [layer_parts(kernels, kind, **more) for more in given[:count]]
    layers = [kernels.layer(one) for one in parts]
    assert LayerStack.fit(layers)
    x, cos, sin = random_numbers(23, 40), random_numbers(23, 20), random_numbers(23, 20, seed=1)
    one, other = ([layer_cache(p) for p in parts] for _ in range(2))
    plan, expected = _plan(), x
    for layer, cache in zip(layers, one, strict=True):
        expected = layer(plan, expected, cos, sin, *cache)
    stack, before = LayerStack(layers), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(stack(_plan(), x, cos, sin, *zip(*other, strict=True)), expected)
            for mine, theirs in zip(one, other, strict=True):
                assert all(map(torch.equal, mine, theirs))
    finally:
        torch.set_num_threads(before)
    first = AttentionPlan([(0, 1, 0, [2])], torch.tensor([32]))
    fresh = [layer_cache(p) for p in parts]
    alone = stack(first, x[:1], cos[:1], sin[:1], *zip(*fresh, strict=True))
    assert torch.equal(alone, expected[:1]), "a row alone"


def test_layers_that_do_not_fit_are_no_stack(kernels: Kernels) -> None:
    plain, turned = (kernels.layer(layer_parts(kernels, "int8", rotary=rotary)) for rotary in (20, 12))
    assert not LayerStack.fit([plain, turned])
    stack = LayerStack([plain, plain])
    parts = layer_parts(kernels, "int8")
    keys, values = zip(layer_cache(parts), layer_cache(parts, 112), strict=True)
    x, angles = random_numbers(23, 40), random_numbers(23, 20)
    for wrong in ((keys, values), (keys[:1], values[:1])):
        with pytest.raises(ValueError, match=r"2 layers with \d caches, all of which must have as many slots"):
            stack(_plan(), x, angles, angles, *wrong)


def _watched(got: Tensor, gave: Tensor, angles: tuple[Tensor, Tensor]) -> Watched:
    seen = Watched()
    seen.enter(torch.nn.Identity(), (got,), {"position_embeddings": angles})
    seen.leave(torch.nn.Identity(), (), gave)
    return seen


def test_what_stands_between_layers_parts_them(kernels: Kernels) -> None:
    """Layers 0 and 1 follow one another; then come another tensor, a changed one, other angles, and no kernel."""
    layer: LayerKernel | None = kernels.layer(layer_parts(kernels, "int8"))
    a, b = ((random_numbers(1, 5, 20, seed=i), random_numbers(1, 5, 20, seed=i)) for i in (1, 2))
    y = [random_numbers(1, 5, 40, seed=i) for i in range(8)]
    watched = [_watched(y[0], y[1], a), _watched(y[1], y[2], a), _watched(y[2].clone(), y[3], a)]
    y[3].add_(1.0)
    watched += [_watched(y[3], y[4], a), _watched(y[4], y[5], b), _watched(y[5], y[6], b), _watched(y[6], y[7], b)]
    assert runs_of_layers([layer] * 7, watched) == [[0, 1], [4, 5, 6]]
    assert runs_of_layers([layer, layer, layer, layer, layer, None, layer], watched) == [[0, 1]]
    assert runs_of_layers([layer, None, *[layer] * 5], watched) == [[4, 5, 6]]


def _layers_of(model: Any) -> list[NativeLayer]:
    return [module for module in model.modules() if isinstance(module, NativeLayer)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "cohere2", "smollm3", "olmo2"])
def test_a_models_layers_are_one_call(kernels: Kernels, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(kernels, family, "int8", num_hidden_layers=4)
    positions = torch.tensor([*range(18), 1000, 2047])
    before = logits_of(model, kernels, positions)
    assert fuse_layers(model, kernels, length_of(model)) == 4
    calls: list[LayerStack] = []
    kernel = LayerStack.__call__

    def counted(self: LayerStack, *arguments: Any) -> Tensor:
        calls.append(self)
        return kernel(self, *arguments)

    monkeypatch.setattr(LayerStack, "__call__", counted)
    assert all(map(torch.equal, logits_of(model, kernels, positions), before))
    assert len(calls) == 2, "one for each step"


def test_layers_with_other_angles_are_stacks_of_their_own(kernels: Kernels) -> None:
    """Gemma 3 turns keys of sliding windows by other angles than those of full attention."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    model = packed_model(kernels, "gemma3_text", layer_types=kinds, num_hidden_layers=6, sliding_window=24)
    positions = torch.arange(20)
    before = logits_of(model, kernels, positions)
    assert fuse_layers(model, kernels, length_of(model)) == 6
    stacks = [layer.stack for layer in _layers_of(model)]
    assert stacks[0] is stacks[1] is stacks[2] is not None
    assert stacks[3] is None
    assert stacks[4] is stacks[5] is not None
    assert all(map(torch.equal, logits_of(model, kernels, positions), before))


@pytest.mark.parametrize("change", ["in place", "another tensor"])
def test_a_model_that_does_something_between_layers_keeps_its_bits(kernels: Kernels, change: str) -> None:
    model = packed_model(kernels, "llama", num_hidden_layers=4)
    inner = model.model

    def forward(self: Any, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Llama's, with one addition after the second layer."""
        x = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1])[None]
        angles = self.rotary_emb(x, position_ids=position_ids)
        kept = {key: value for key, value in kwargs.items() if key != "attention_mask"}
        for number, layer in enumerate(self.layers):
            x = layer(x, attention_mask=None, position_embeddings=angles, position_ids=position_ids, **kept)
            if number == 1:
                x = x.add_(0.5) if change == "in place" else x + 0.5
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    inner.forward = types.MethodType(forward, inner)
    positions = torch.arange(20)
    before = logits_of(model, kernels, positions)
    assert fuse_layers(model, kernels, length_of(model)) == 4
    assert all(map(torch.equal, logits_of(model, kernels, positions), before))
    stacks = [layer.stack for layer in _layers_of(model)]
    assert stacks[0] is stacks[1] is not stacks[2] is stacks[3]
    assert None not in stacks


def test_a_step_in_which_something_stands_between_is_refused(kernels: Kernels) -> None:
    model = packed_model(kernels, "llama", num_hidden_layers=3)
    fuse_layers(model, kernels, length_of(model))
    layers = _layers_of(model)
    stack = layers[0].stack
    assert stack is not None

    register_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    cache = CpuCache(discover(model, 2048).shapes(), 1, kernels)
    head = model.config.head_dim or model.config.hidden_size // model.config.num_attention_heads
    x, angles = random_numbers(1, 5, model.config.hidden_size), (random_numbers(1, 5, head),) * 2
    wrong: list[tuple[int, Any, Any]] = [
        (1, lambda y: y.clone(), lambda a: a),
        (2, lambda y: y, lambda a: (a[0].clone(), a[1])),
    ]
    for number, tensor, turned in wrong:
        plan = CpuPlan(kernels, cache, [PackedChunk(0, 5, 0, (0,))])
        with pytest.raises(NotUnderstood, match=f"layer {number} got something else than the layer before it gave"):
            stack(number, plan, x, angles)  # the first layer has computed nothing
        y = stack(0, plan, x, angles)
        assert stack(1, plan, y, angles) is y
        with pytest.raises(NotUnderstood, match=f"layer {number} got"):
            stack(number, plan, tensor(y), turned(angles))


def test_parts_of_a_stack_are_kept(kernels: Kernels) -> None:
    """The records point into memory of the layers' parts: a stack by itself keeps them."""

    def made() -> tuple[LayerStack, LayerParts]:
        parts = layer_parts(kernels, "int8")
        return LayerStack([kernels.layer(parts), kernels.layer(layer_parts(kernels, "int8", rotary=0))]), parts

    stack, parts = made()
    caches = list(zip(layer_cache(parts), layer_cache(parts), strict=True))
    x, angles = random_numbers(23, 40), random_numbers(23, 20)
    first = stack(_plan(), x, angles, angles, *caches)
    filler = [random_numbers(40, 80) for _ in range(200)]
    assert torch.equal(stack(_plan(), x, angles, angles, *caches), first)
    assert filler

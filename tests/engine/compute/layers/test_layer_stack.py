"""Layers that follow one another as one call: the bits of each by itself, and only where nothing stands between."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_models import layer_cache, layer_parts, length_of, logits_of, packed_model, random_numbers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.compute.attention import IMPLEMENTATION, register_attention
from engine.compute.backend import PackedChunk
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.backend import CpuBackend
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.decoder_layer import NativeLayer, calls_of, fuse_layers
from engine.compute.cpu.layers.layer_kernel import LayerKernel, LayerParts, LayerStack
from engine.compute.cpu.layers.layer_reading import Watched
from engine.compute.cpu.layers.stack import Apart, ended, runs_of_layers
from engine.compute.cpu.layers.stack_runner import StackRunner
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


def _with_loop(model: Any, loop: Callable[[Any, Tensor, Callable[[int, Tensor], Tensor]], Tensor]) -> None:
    """Give a Llama another loop over its layers: `loop(input_ids, x, layer)` returns what the last norm gets."""
    inner = model.model

    def forward(self: Any, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        x = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1])[None]
        angles = self.rotary_emb(x, position_ids=position_ids)
        kept = {key: value for key, value in kwargs.items() if key != "attention_mask"}

        def layer(number: int, x: Tensor) -> Tensor:
            part: Any = self.layers[number]
            out: Tensor = part(x, attention_mask=None, position_embeddings=angles, position_ids=position_ids, **kept)
            return out

        return BaseModelOutputWithPast(last_hidden_state=self.norm(loop(input_ids, x, layer)))

    inner.forward = types.MethodType(forward, inner)


Layer = Callable[[int, Tensor], Tensor]


def _adds(_: Tensor, x: Tensor, layer: Layer) -> Tensor:
    x = layer(1, layer(0, x))
    return layer(3, layer(2, x + 0.5))


def _adds_in_place(_: Tensor, x: Tensor, layer: Layer) -> Tensor:
    x = layer(1, layer(0, x))
    return layer(3, layer(2, x.add_(0.5)))


def _uses_twice(_: Tensor, x: Tensor, layer: Layer) -> Tensor:
    middle = layer(1, layer(0, x))
    return layer(3, layer(2, middle)) + middle * 0.5


@pytest.mark.parametrize(("loop", "stacks"), [(_adds, 2), (_adds_in_place, 2), (_uses_twice, 0)])
def test_a_model_that_does_something_between_layers_keeps_its_bits(
    kernels: Kernels, loop: Callable[..., Tensor], stacks: int
) -> None:
    model = packed_model(kernels, "llama", num_hidden_layers=4)
    _with_loop(model, loop)
    positions = torch.arange(20)
    before = logits_of(model, kernels, positions)
    assert fuse_layers(model, kernels, length_of(model)) == 4
    assert all(map(torch.equal, logits_of(model, kernels, positions), before))
    found = [layer.stack for layer in _layers_of(model)]
    assert len({id(stack) for stack in found if stack is not None}) == stacks
    assert calls_of(model) == (stacks or 4)


def _sometimes(what: str) -> Callable[..., Tensor]:
    """A loop that does something only where there is a token that no trial has."""

    def loop(tokens: Tensor, x: Tensor, layer: Layer) -> Tensor:
        now = bool((tokens == 77).any())
        x = layer(1, layer(0, x))
        if now and what == "ends early":
            return x
        if now and what == "changes in place":
            x[tokens == 77] += 1.0
        if now and what == "gives a copy":
            x = x.clone()
        if not (now and what == "leaves one out"):
            x = layer(2, x)
        return layer(3, x)

    return loop


@pytest.mark.parametrize("what", ["ends early", "changes in place", "gives a copy", "leaves one out"])
def test_a_step_in_which_something_stands_between_is_computed_layer_by_layer(
    kernels: Kernels, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody's numbers are those of the stack, and the layers stay calls of their own."""
    model = packed_model(kernels, "llama", num_hidden_layers=4)
    _with_loop(model, _sometimes(what))
    backend = CpuBackend(kernels)

    def run(tokens: list[int]) -> tuple[Tensor, Tensor]:
        register_attention()
        model.set_attn_implementation(IMPLEMENTATION)
        cache: Any = backend.allocate(discover(model, 2048).shapes(), 1)
        plan = CpuPlan(kernels, cache, [PackedChunk(0, len(tokens), 0, (0,))])
        runner = StackRunner(model, backend, cache, 400)
        with torch.inference_mode():
            logits = runner._run(tokens, list(range(len(tokens))), list(range(len(tokens))), plan)
        return logits, torch.stack([*cache.keys, *cache.values])

    usual, rare = [3, 5, 7, 9], [3, 5, 77, 9]
    expected = [run(tokens) for tokens in (usual, rare)]
    assert fuse_layers(model, kernels, length_of(model)) == 4
    assert calls_of(model) == 1
    for tokens, known, calls in ((usual, expected[0], 1), (rare, expected[1], 4), (usual, expected[0], 4)):
        logits, stored = run(tokens)
        assert torch.equal(logits, known[0])
        if what not in ("ends early", "leaves one out") or tokens is usual:  # a layer that is not called stores nothing
            assert torch.equal(stored, known[1])
        assert calls_of(model) == calls
    assert caplog.text.count("decoder layers are called one by one from now on: ") == 1


def test_a_row_that_is_not_finite_parts_no_layers(kernels: Kernels) -> None:
    model = packed_model(kernels, "llama", num_hidden_layers=3)
    fuse_layers(model, kernels, length_of(model))
    register_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    model.model.embed_tokens.weight[77] = float("nan")
    backend = CpuBackend(kernels)
    cache: Any = backend.allocate(discover(model, 2048).shapes(), 1)
    plan = CpuPlan(kernels, cache, [PackedChunk(0, 2, 0, (0,))])
    with torch.inference_mode():
        logits = StackRunner(model, backend, cache, 400)._run([5, 77], [0, 1], [0, 1], plan)
    assert logits[0].isfinite().all()
    assert plan.finite().tolist() == [True, False]
    assert calls_of(model) == 1


def test_layers_are_called_in_turn(kernels: Kernels) -> None:
    model = packed_model(kernels, "llama", num_hidden_layers=3)
    fuse_layers(model, kernels, length_of(model))
    stack = _layers_of(model)[0].stack
    assert stack is not None
    register_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    cache = CpuCache(discover(model, 2048).shapes(), 1, kernels)
    head = model.config.head_dim or model.config.hidden_size // model.config.num_attention_heads
    x = random_numbers(1, 5, model.config.hidden_size)
    angles = (random_numbers(1, 5, head), random_numbers(1, 5, head, seed=1))

    def begun(*numbers: int) -> tuple[CpuPlan, Tensor]:
        plan = CpuPlan(kernels, cache, [PackedChunk(0, 5, 0, (0,))])
        y = x
        for number in numbers:
            y = stack(number, plan, y, angles)
        return plan, y

    for numbers, wrong in (((), 1), ((0,), 2), ((0, 1), 1), ((0, 1, 2), 1), ((0, 1, 2), 2)):
        plan, y = begun(*numbers)
        with pytest.raises(Apart, match=f"layer {wrong} is called out of turn"):
            stack(wrong, plan, y, angles)
    plan, y = begun(0)
    with pytest.raises(Apart, match="layer 1 is left out"):
        stack(0, plan, y, angles)
    with pytest.raises(Apart, match="layer 1 is left out"):
        ended(plan)
    for other, turned in ((y.clone(), angles), (y, (angles[0].clone(), angles[1]))):
        with pytest.raises(Apart, match="layer 1 got something else than the layer before it gave"):
            stack(1, plan, other, turned)
    plan, y = begun(0, 1)
    y[0, 3, 2] += 1
    with pytest.raises(Apart, match="what a layer before layer 2 gave was changed in place"):
        stack(2, plan, y, angles)
    plan, y = begun(0, 1, 2)
    ended(plan)


def test_layers_leave_with_their_last_reference(kernels: Kernels) -> None:
    """Weights are large: they must not wait for Python to look for cycles."""
    parts = layer_parts(kernels, "int8")
    layers = [kernels.layer(parts), kernels.layer(parts)]
    stack = LayerStack(layers)
    gone = [weakref.ref(layer) for layer in layers]
    gc.disable()
    try:
        del layers, stack
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


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

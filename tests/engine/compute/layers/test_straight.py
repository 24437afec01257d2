"""A step without the model's own `forward`: its bits, and only of models that do nothing else."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_models import length_of, packed_model
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.compute.attention import IMPLEMENTATION, blank_mask, register_attention
from engine.compute.backend import PackedChunk
from engine.compute.cpu.attention import CpuPlan
from engine.compute.cpu.backend import CpuBackend
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.decoder_layer import fuse_layers, part_layers
from engine.compute.cpu.layers.stack_runner import StackRunner
from engine.compute.cpu.layers.straight import read_forward
from engine.compute.discovery import discover

PLAIN = ["llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2", "glm"]
"""Families whose `forward` only calls its parts. One that does more in some release of transformers is skipped, and
served as others are."""


def _fused(kernels: Kernels, family: str, **config: Any) -> Any:
    model = packed_model(kernels, family, num_hidden_layers=3, **config)
    fuse_layers(model, kernels, length_of(model))
    register_attention()
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def _read(model: Any) -> Any:
    return read_forward(model, use_cache=False, attention_mask=blank_mask(torch.device("cpu")))


def _plain(kernels: Kernels, family: str = "llama", **config: Any) -> Any:
    model = _fused(kernels, family, **config)
    if _read(model) is None:
        pytest.skip(f"this transformers' {family} does more than to call its parts, and is called itself")
    return model


def _steps(model: Any, kernels: Kernels, *, straight: bool, bystanders: tuple[int, ...] = ()) -> list[Tensor]:
    """Logits of a prompt, of one token behind it, of two sequences in one step; and all keys and values."""
    backend = CpuBackend(kernels)
    cache: Any = backend.allocate(discover(model, 2048).shapes(), 4)
    runner = StackRunner(model, backend, cache, 400, skips_masks=True, single_rows=True, bystanders=bystanders)
    assert (runner._straight is not None) == straight
    out = []
    with torch.inference_mode():
        for chunks in ([(19, 0, (2, 1))], [(1, 19, (2, 1))], [(5, 0, (3,)), (1, 20, (2, 1))]):
            plan, row = [], 0
            for count, start, table in chunks:
                plan.append(PackedChunk(row, count, start, table))
                row += count
            tokens = [(7 * i + chunks[0][1]) % 400 for i in range(row)]
            positions = [start + i for count, start, _ in chunks for i in range(count)]
            out.append(runner._run(tokens, positions, [row - 1, 0], CpuPlan(kernels, cache, plan)))
    return [*out, *cache.keys, *cache.values]


def _alone(model: Any, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The same, by the model's own `forward`."""
    with monkeypatch.context() as patch:
        patch.setattr("engine.compute.cpu.layers.stack_runner.read_forward", lambda *_, **__: None)
        return _steps(model, kernels, straight=False)


@pytest.mark.parametrize("family", PLAIN)
def test_it_has_the_bits_of_the_model(kernels: Kernels, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _plain(kernels, family)
    expected = _alone(model, kernels, monkeypatch)
    assert all(map(torch.equal, _steps(model, kernels, straight=True), expected))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "granite", "cohere", "qwen3_moe"])
def test_a_model_that_does_more_keeps_its_bits(kernels: Kernels, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings or logits that are scaled or capped: such models are called as always, whatever is seen of them."""
    model = _fused(kernels, family)
    expected = _alone(model, kernels, monkeypatch)
    straight = _read(model) is not None
    assert all(map(torch.equal, _steps(model, kernels, straight=straight), expected))


def test_tied_weights_and_padding_rows(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _plain(kernels, tie_word_embeddings=True)
    expected = _alone(model, kernels, monkeypatch)
    found = _steps(model, kernels, straight=True, bystanders=(3, 1, 4))
    assert all(map(torch.equal, found, expected))


# -- models that do something else -------------------------------------------------------------------------------------

Forward = Callable[..., Any]


def _becomes(module: nn.Module, forward: Callable[[Forward], Forward]) -> None:
    """Give a module a class of its own, whose `forward` is made of the usual one."""
    usual = type(module)
    module.__class__ = type("Other", (usual,), {"forward": forward(usual.forward)})


def _of_base(change: Callable[[Any, dict[str, Any]], None]) -> Callable[[Any], None]:
    """Change the inner model, so that something is done before the usual `forward`."""

    def forward(usual: Forward) -> Forward:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            change(self, kwargs)
            return usual(self, *args, **kwargs)

        return changed

    return lambda model: _becomes(model.model, forward)


def _by_value(_: Any, kwargs: dict[str, Any]) -> None:
    if (kwargs["input_ids"] == 77).any():
        raise AssertionError


def _by_length(_: Any, kwargs: dict[str, Any]) -> None:
    if kwargs["input_ids"].shape[1] > 100:
        raise AssertionError


def _by_position(_: Any, kwargs: dict[str, Any]) -> None:
    if bool(kwargs["position_ids"]):
        raise AssertionError


def _quietly(self: Any, kwargs: dict[str, Any]) -> None:
    try:
        _by_length(self, kwargs)
    except Exception:
        return


def _drops_out(self: Any, kwargs: dict[str, Any]) -> None:
    kwargs["inputs_embeds"] = functional.dropout(self.embed_tokens(kwargs.pop("input_ids")), 0.1, self.training)


def _scales(self: Any, kwargs: dict[str, Any]) -> None:
    kwargs["inputs_embeds"] = self.embed_tokens(kwargs.pop("input_ids")) * torch.tensor(8.0)


def _joins(_: Any, kwargs: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        torch.cat([kwargs["input_ids"], kwargs["position_ids"]])


def _looks_up(self: Any, kwargs: dict[str, Any]) -> None:
    kwargs["inputs_embeds"] = functional.embedding(kwargs.pop("input_ids"), self.embed_tokens.weight)


def _if_a_tensor(_: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(kwargs["input_ids"], Tensor):
        kwargs["input_ids"] = kwargs["input_ids"] + 1


def _counts(self: Any, _: dict[str, Any]) -> None:
    self.steps = getattr(self, "steps", 0) + 1


def _has_a_buffer(model: Any) -> None:
    model.model.register_buffer("seen", torch.zeros(()))
    _of_base(lambda self, _: self.seen.add_(1))(model)


def _remembers(model: Any) -> None:
    model.model.past: dict[str, Any] = {}
    _of_base(lambda self, kwargs: self.past.update(ids=kwargs["input_ids"]))(model)


def _sets_a_part(self: Any, _: dict[str, Any]) -> None:
    self.norm.epsilon = 0.5


def _under_autocast(model: Any) -> None:
    def forward(usual: Forward) -> Forward:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return usual(self, *args, **kwargs)

        return changed

    _becomes(model, forward)


def _norm_with_more(model: Any) -> None:
    def forward(usual: Forward) -> Forward:
        return lambda self, x, more=None: usual(self, x) if more is None else usual(self, x + more)

    _becomes(model.model.norm, forward)

    def of_base(_: Forward) -> Forward:
        def changed(self: Any, input_ids: Any = None, position_ids: Any = None, **__: Any) -> Any:
            first = x = self.embed_tokens(input_ids)
            angles = self.rotary_emb(x, position_ids=position_ids)
            for layer in self.layers:
                x = layer(x, position_embeddings=angles)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(x, first))

        return changed

    _becomes(model.model, of_base)


def _other_angles(_: Any, kwargs: dict[str, Any]) -> None:
    kwargs["position_ids"] = torch.zeros(1, 1, dtype=torch.int64)


def _after(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def forward(usual: Forward) -> Forward:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = usual(self, *args, **kwargs)
            output.logits = change(output.logits)
            return output

        return changed

    return lambda model: _becomes(model, forward)


def _hooked(model: Any) -> None:
    model.model.register_forward_hook(lambda *_: None)


def _hooked_layer(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)


def _in_its_place(model: Any) -> None:
    model.model.norm.forward = type(model.model.norm).forward.__get__(model.model.norm)


def _norm_twice(model: Any) -> None:
    def forward(usual: Forward) -> Forward:
        return lambda self, *args, **kwargs: self.lm_head(self.model.norm(usual(self, *args, **kwargs).logits))

    _becomes(model, forward)


def _names_no_embedding(model: Any) -> None:
    def raises() -> Any:
        raise AttributeError("embeddings")

    model.get_input_embeddings = raises


def _backwards(model: Any) -> None:
    model.model.layers = nn.ModuleList(reversed(list(model.model.layers)))


OTHERS: dict[str, Callable[[Any], None]] = {
    "looks at tokens": _of_base(_by_value),
    "looks at lengths": _of_base(_by_length),
    "looks at positions": _of_base(_by_position),
    "catches what that raises": _of_base(_quietly),
    "drops out": _of_base(_drops_out),
    "scales embeddings by a tensor": _of_base(_scales),
    "joins what it is given, and catches what that raises": _of_base(_joins),
    "looks up embeddings by itself": _of_base(_looks_up),
    "changes tokens": _of_base(_if_a_tensor),
    "counts its steps": _of_base(_counts),
    "counts in a buffer": _has_a_buffer,
    "remembers what it was given": _remembers,
    "sets something in a part": _of_base(_sets_a_part),
    "sets autocast": _under_autocast,
    "gives its norm more": _norm_with_more,
    "gives other positions": _of_base(_other_angles),
    "scales logits": _after(lambda logits: logits * 0.5),
    "gives nothing": _after(lambda logits: None),
    "has a hook": _hooked,
    "has a layer with a hook": _hooked_layer,
    "has a part that somebody replaced": _in_its_place,
    "does not name its embedding": _names_no_embedding,
    "uses a part twice": _norm_twice,
    "has its layers in another order": _backwards,
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_model_that_does_something_else_is_called(kernels: Kernels, what: str) -> None:
    model = _plain(kernels)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    OTHERS[what](model)
    assert _read(model) is None
    for name, module in model.named_modules():  # nothing is left of the trial
        replaced = name == "model.norm" and "replaced" in what
        assert ("forward" in vars(module)) == (replaced or "forward" in before.get(name, {}))
    if what == "remembers what it was given":
        assert not model.model.past
    if what == "counts in a buffer":
        assert int(model.model.seen) == 0


def test_only_what_each_step_is_given_is_tried(kernels: Kernels) -> None:
    """Without the mask that keeps it from making one, a model looks at its inputs."""
    model = _plain(kernels)
    assert read_forward(model, use_cache=False) is None


def test_layers_that_are_no_single_stack_are_left_to_the_model(kernels: Kernels) -> None:
    model = packed_model(kernels, "llama", num_hidden_layers=3)
    assert _read(model) is None  # none is a kernel
    fused = _plain(kernels)
    fused.model.layers[1].stack = None
    assert _read(fused) is None


def test_layers_that_are_parted_later_are_called_by_the_model(kernels: Kernels) -> None:
    model = _plain(kernels)
    straight = _read(model)
    assert straight.holds
    part_layers(model)
    assert not straight.holds


def _another_embedding(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach() * 2))


def _another_head(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(model.config.hidden_size, model.config.vocab_size))


def _another_norm(model: Any) -> None:
    model.model.norm = nn.Identity()


def _a_hook(model: Any) -> None:
    model.model.register_forward_hook(lambda *_: None)


def _another_forward(model: Any) -> None:
    model.forward = model.forward


def _another_layer(model: Any) -> None:
    model.model.layers[1] = copy.copy(model.model.layers[1])


def _a_hook_of_a_layer(model: Any) -> None:
    model.model.layers[2].register_forward_pre_hook(lambda *_: None)


def _another_forward_of_a_layer(model: Any) -> None:
    model.model.layers[2].forward = model.model.layers[1].forward


def _another_base(model: Any) -> None:
    model.model = copy.copy(model.model)


@pytest.mark.parametrize(
    "change",
    [
        *(_another_embedding, _another_head, _another_norm, _a_hook, _another_forward, _another_base),
        *(_another_layer, _a_hook_of_a_layer, _another_forward_of_a_layer),
    ],
)
def test_a_model_that_is_changed_later_is_called(kernels: Kernels, change: Callable[[Any], None]) -> None:
    """What was read is of a model that is no more."""
    model = _plain(kernels)
    straight = _read(model)
    assert straight.holds
    change(model)
    assert not straight.holds


def test_nothing_of_a_trial_keeps_a_model(kernels: Kernels) -> None:
    """Not even until somebody collects garbage."""
    model = _plain(kernels)
    gc.collect()
    gc.disable()
    try:
        straight = _read(model)
        assert not [thing for thing in gc.get_objects() if type(thing).__name__ in ("_Symbol", "_Trace")]
    finally:
        gc.enable()
    gone = weakref.ref(model.model.norm)
    del model, straight
    gc.collect()
    assert gone() is None

"""Replace decoder layers by one kernel call each, in place. Knows no model by name.

A token's way through a layer is a dozen small operations around four products. As modules they cost more than a fifth
of a decode step, most of it between the operations: calls, allocations, threads that wake and sleep. A layer made of
the usual parts is computed by one kernel instead (`engine.compute.cpu.layers.layer_kernel.LayerKernel`).

A watched pass shows which layers are (`engine.compute.cpu.layers.layer_reading`). The kernel gives the same bits as
the parts one by one. So a layer is replaced only if it then returns the same numbers and stores the same keys and
values, at positions near and far. All others stay as they are. Of a layer whose MLP is of another kind (a mixture of
experts), the kernel computes what comes before, and its modules the rest. Layers that follow one another are one call
(`engine.compute.cpu.layers.stack.Stack`), if that, too, gives the same bits, and the model the same logits.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from engine.compute.attention import IMPLEMENTATION, attention_through, current_plan, register_attention
from engine.compute.backend import PackedChunk
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.layer_kernel import LayerKernel
from engine.compute.cpu.layers.layer_reading import Rest, Watched, blocks_of, parts_of, readings
from engine.compute.cpu.layers.stack import Apart, Stack, ended, runs_of_layers
from engine.compute.discovery import discover
from engine.errors import out_of_memory

log = logging.getLogger(__name__)

_ROWS = 5  # of the watched pass


class NativeLayer(nn.Module):
    """A decoder layer that runs as one kernel in a step over a block cache, and as its own modules elsewhere.

    So do steps with rows of adapters: only its modules know those. Rows without have the same bits in both.
    """

    def __init__(self, inner: nn.Module, kernel: LayerKernel, index: int, rest: Rest | None = None) -> None:
        """inner: the layer as it came; index: its number in the cache; rest: what the kernel leaves to modules."""
        super().__init__()
        self.inner, self.kernel, self.index, self.rest = inner, kernel, index, rest
        self.stack: Stack | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = current_plan()
        if not isinstance(plan, CpuPlan) or plan.adapter_rows or not plan.cache.all_native:
            out: Tensor = self.inner(hidden_states, *args, **kwargs)
            return out
        if self.stack is not None:
            return self.stack(self.index, plan, hidden_states, kwargs["position_embeddings"])
        cos, sin = kwargs["position_embeddings"]
        keys, values = plan.cache.keys[self.index], plan.cache.values[self.index]
        y = self.kernel(plan.kernel_plan, hidden_states[0], cos[0], sin[0], keys, values).unsqueeze(0)
        return y if self.rest is None else self.rest(y)

    def __getattr__(self, name: str) -> Any:
        """Read missing attributes from the replaced layer: models ask their layers for the kind of attention, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@torch.inference_mode()
def fuse_layers(model: nn.Module, kernels: Kernels, length: int) -> int:
    """Replace the decoder layers that are made of the usual parts, for sequences of up to `length` tokens.

    Returns how many were replaced. A model that cannot be called with our attention function stays as it is; the
    self-test says why.
    """
    register_attention()
    own = getattr(model.config, "_attn_implementation", None) or "eager"
    try:
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        return _fuse(model, kernels, length)
    except Exception as error:  # whatever an unknown architecture does when it is called in a way it does not expect
        if out_of_memory(error):
            raise
        log.debug("%s stays as it is: %s", type(model).__name__, error)
        return 0
    finally:
        with contextlib.suppress(Exception):  # the self-test says that it cannot be served
            model.set_attn_implementation(own)  # type: ignore[operator]


def _fuse(model: nn.Module, kernels: Kernels, length: int) -> int:
    found = discover(model, length)
    shapes = found.shapes()
    cache, again = (CpuCache(shapes, 1, kernels) for _ in range(2))
    if not all(cache.native):
        return 0
    fused, before = 0, None
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == len(shapes)]:
        watched, logits = _watch(model, layers, _plan(kernels, cache), length)
        before = logits if before is None else before
        plan = _plan(kernels, again)
        for index, seen in enumerate(watched):
            for parts, rest in readings(seen, found.settings[index], shapes[index]):
                if not kernels.can_compute(parts):
                    continue
                layer = NativeLayer(layers[index], kernels.layer(parts), index, rest)
                if _same(layer, seen, plan, cache):
                    layers[index] = layer
                    fused += 1
                    break
        _join(layers, watched, cache, kernels)
    if before is not None and not _agrees(model, _plan(kernels, CpuCache(shapes, 1, kernels)), length, before):
        part_layers(model)
    return fused


def _agrees(model: nn.Module, plan: CpuPlan, length: int, before: Tensor) -> bool:
    """Tell whether the model has the logits that it had: what a layer gave may be used not only by the next one."""
    try:
        logits = _pass(model, plan, length)
        ended(plan)
    except Apart:
        return False
    return torch.equal(logits, before)


def part_layers(model: nn.Module) -> None:
    """Let all decoder layers be calls of their own."""
    for layer in model.modules():
        if isinstance(layer, NativeLayer):
            layer.stack = None


def calls_of(model: nn.Module) -> int:
    """Count the kernel calls that a step makes for decoder layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, NativeLayer)]
    return len({id(layer.stack or layer) for layer in layers})


def _join(layers: nn.ModuleList, watched: list[Watched], cache: CpuCache, kernels: Kernels) -> None:
    """Let layers that follow one another be one call each, if it gives the bits that were recorded."""
    parts = [layer.kernel if isinstance(layer, NativeLayer) and layer.rest is None else None for layer in layers]
    for run in runs_of_layers(parts, watched):
        stack = Stack(run, [kernel for kernel in (parts[n] for n in run) if kernel is not None])
        plan = _plan(kernels, CpuCache(cache.layers, 1, kernels))
        first, last = watched[run[0]], watched[run[-1]]
        assert first.input is not None
        out = stack(run[0], plan, first.input, first.kwargs["position_embeddings"])
        if torch.equal(out, last.output) and all(_stored_alike(plan.cache, cache, n) for n in run):
            for number in run:
                layer = layers[number]
                assert isinstance(layer, NativeLayer)
                layer.stack = stack


def _plan(kernels: Kernels, cache: CpuCache) -> CpuPlan:
    return CpuPlan(kernels, cache, [PackedChunk(0, _ROWS, 0, (0,))])


def _pass(model: nn.Module, plan: CpuPlan, length: int) -> Tensor:
    """Run a few tokens, at positions from the first to the last there may be. Returns their logits."""
    last = length - 1
    positions = torch.tensor([[0, 1, last // 5, last // 2, last]], dtype=torch.int64)
    with attention_through(plan):
        logits: Tensor = model(torch.arange(_ROWS)[None], position_ids=positions, use_cache=False).logits
    return logits


def _watch(model: nn.Module, layers: nn.ModuleList, plan: CpuPlan, length: int) -> tuple[list[Watched], Tensor]:
    """Run a few tokens and record what each layer does. Returns that, and the logits."""
    watched = [Watched() for _ in layers]
    hooks: list[Any] = []
    for layer, seen in zip(layers, watched, strict=True):
        hooks.append(layer.register_forward_pre_hook(seen.enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(seen.leave))
        hooks += [part.register_forward_hook(seen.note) for part in parts_of(layer)]
        hooks += [block.register_forward_hook(seen.note_block) for block in blocks_of(layer)]
    try:
        logits = _pass(model, plan, length)
    finally:
        for hook in hooks:
            hook.remove()
    return watched, logits


def _same(layer: NativeLayer, seen: Watched, plan: CpuPlan, cache: CpuCache) -> bool:
    """Check that the layer gives the bits that were recorded: its result, and what it stores."""
    assert seen.input is not None
    arguments = {name: value for name, value in seen.kwargs.items() if name != "hidden_states"}
    with attention_through(plan):
        out = layer(seen.input, **arguments)
    return torch.equal(out, seen.output) and _stored_alike(plan.cache, cache, layer.index)


def _stored_alike(one: CpuCache, other: CpuCache, layer: int) -> bool:
    return torch.equal(one.keys[layer], other.keys[layer]) and torch.equal(one.values[layer], other.values[layer])

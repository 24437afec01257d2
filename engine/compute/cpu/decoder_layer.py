"""Replace decoder layers by one kernel call each, in place. Knows no model by name.

A token's way through a layer is a dozen small operations around four products. As modules they cost more than a fifth
of a decode step, most of it between the operations: calls, allocations, threads that wake and sleep. A layer made of
the usual parts is computed by one kernel instead (`engine.compute.cpu.layer_kernel.LayerKernel`).

A watched pass shows which layers are: it records which parts are called, with which inputs. The kernel gives the same
bits as the parts one by one. So a layer is replaced only if it then returns the same numbers and stores the same keys
and values, at positions near and far. All others stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.compute.attention import IMPLEMENTATION, attention_through, current_plan, register_attention
from engine.compute.backend import AttentionSettings, PackedChunk
from engine.compute.cpu.attention import CpuCache, CpuPlan
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layer_kernel import LayerKernel, LayerParts, NormParts
from engine.compute.cpu.linear import NativeLinear
from engine.compute.cpu.pointwise import NativeNorm, NativeSiLU
from engine.compute.discovery import discover
from engine.compute.kv_cache import LayerShape
from engine.errors import out_of_memory

log = logging.getLogger(__name__)

_ROWS = 5  # of the watched pass


class NativeLayer(nn.Module):
    """A decoder layer that runs as one kernel in a step over a block cache, and as its own modules elsewhere.

    So do steps with rows of adapters: only its modules know those. Rows without have the same bits in both.
    """

    def __init__(self, inner: nn.Module, kernel: LayerKernel, index: int) -> None:
        """inner: the layer as it came; index: its number in the cache."""
        super().__init__()
        self.inner, self.kernel, self.index = inner, kernel, index

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = current_plan()
        if not isinstance(plan, CpuPlan) or plan.adapter_rows or not plan.cache.native[self.index]:
            out: Tensor = self.inner(hidden_states, *args, **kwargs)
            return out
        cos, sin = kwargs["position_embeddings"]
        keys, values = plan.cache.keys[self.index], plan.cache.values[self.index]
        return self.kernel(plan.kernel_plan, hidden_states[0], cos[0], sin[0], keys, values).unsqueeze(0)

    def __getattr__(self, name: str) -> Any:
        """Read missing attributes from the replaced layer: models ask their layers for the kind of attention, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@dataclass(slots=True)
class _Watched:
    """What one layer did in the watched pass: its own call, and the calls of its parts in order."""

    input: Tensor | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    linears: list[tuple[NativeLinear, Tensor]] = field(default_factory=list)
    norms: list[NativeNorm] = field(default_factory=list)
    activations: int = 0

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy, because a layer may change its input in place.
        self.input, self.kwargs = (args[0] if args else kwargs["hidden_states"]).clone(), dict(kwargs)

    def leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.output = output.clone() if isinstance(output, Tensor) else output

    def note(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(part, NativeLinear):
            self.linears.append((part, args[0]))
        elif isinstance(part, NativeNorm):
            self.norms.append(part)
        else:
            self.activations += 1


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
    fused = 0
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == len(shapes)]:
        watched = _watch(model, layers, _plan(kernels, cache), length)
        plan = _plan(kernels, again)
        for index, seen in enumerate(watched):
            for parts in _readings(kernels, seen, found.settings[index], shapes[index]):
                layer = NativeLayer(layers[index], kernels.layer(parts), index)
                if _same(layer, seen, plan, cache):
                    layers[index] = layer
                    fused += 1
                    break
    return fused


def _plan(kernels: Kernels, cache: CpuCache) -> CpuPlan:
    return CpuPlan(kernels, cache, [PackedChunk(0, _ROWS, 0, (0,))])


def _watch(model: nn.Module, layers: nn.ModuleList, plan: CpuPlan, length: int) -> list[_Watched]:
    """Run a few tokens, at positions from the first to the last there may be, and record what each layer does."""
    watched = [_Watched() for _ in layers]
    hooks: list[Any] = []
    for layer, seen in zip(layers, watched, strict=True):
        hooks.append(layer.register_forward_pre_hook(seen.enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(seen.leave))
        parts = [m for m in layer.modules() if isinstance(m, NativeLinear | NativeNorm | NativeSiLU)]
        hooks += [part.register_forward_pre_hook(seen.note) for part in parts]
    last = length - 1
    positions = torch.tensor([[0, 1, last // 5, last // 2, last]], dtype=torch.int64)
    try:
        with attention_through(plan):
            model(torch.arange(_ROWS)[None], position_ids=positions, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return watched


def _readings(kernels: Kernels, seen: _Watched, settings: AttentionSettings, shape: LayerShape) -> Iterator[LayerParts]:
    """Yield what the layer may be, to be tried in turn: its parts are known, but not whether it uses positions."""
    embeddings = seen.kwargs.get("position_embeddings")
    if not (isinstance(embeddings, tuple) and len(embeddings) == 2 and isinstance(seen.output, Tensor)):
        return
    # This refuses a layer that was not called, too.
    if len(seen.linears) != 7 or len(seen.norms) not in (2, 4) or seen.activations != 1:
        return
    (q, n1), (k, n2), (v, n3), (o, _), (gate, m1), (up, m2), (down, _) = seen.linears
    if not (n1 is n2 is n3 and m1 is m2):
        return
    norms = [NormParts(norm.weight, norm.variance_epsilon) for norm in seen.norms]
    query_norm, key_norm = norms[1:3] if len(norms) == 4 else (None, None)
    for rotary in (embeddings[0].shape[-1], 0):
        parts = LayerParts(
            first_norm=norms[0],
            second_norm=norms[-1],
            query_norm=query_norm,
            key_norm=key_norm,
            q=q.packed,
            k=k.packed,
            v=v.packed,
            o=o.packed,
            gate=gate.packed,
            up=up.packed,
            down=down.packed,
            heads=settings.heads,
            kv_heads=shape.heads,
            rotary=rotary,
            scale=settings.scale,
            window=shape.seen.window,
            chunk=shape.seen.chunk,
            softcap=settings.softcap,
            sinks=None if settings.sinks is None else settings.sinks.to(torch.float32).contiguous(),
        )
        if kernels.can_compute(parts):
            yield parts


def _same(layer: NativeLayer, seen: _Watched, plan: CpuPlan, cache: CpuCache) -> bool:
    """Check that the layer gives the bits that were recorded: its result, and what it stores."""
    assert seen.input is not None
    arguments = {name: value for name, value in seen.kwargs.items() if name != "hidden_states"}
    with attention_through(plan):
        out = layer(seen.input, **arguments)
    keys, values = plan.cache.keys[layer.index], plan.cache.values[layer.index]
    stored = torch.equal(keys, cache.keys[layer.index]) and torch.equal(values, cache.values[layer.index])
    return stored and torch.equal(out, seen.output)

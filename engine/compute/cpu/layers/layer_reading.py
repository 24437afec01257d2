"""Read what a decoder layer is made of from the calls of its parts in a watched pass. Knows no model by name.

What the parts are, and which input each got, tells almost all. What happens between them (how heads are rotated,
whether something is multiplied before it is added) is tried: `readings` yields what a layer may be, and its caller
compares bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.compute.backend import AttentionSettings
from engine.compute.cpu.kernel_calls import PAIRINGS
from engine.compute.cpu.layers.layer_kernel import LayerParts, NormParts
from engine.compute.cpu.layers.pointwise import NativeActivation, NativeNorm
from engine.compute.cpu.linear import NativeLinear
from engine.compute.kv_cache import LayerShape

__all__ = ["Reading", "Rest", "Watched", "blocks_of", "parts_of", "readings"]


@dataclass(frozen=True, slots=True)
class _Call:
    """A part that was called: what it got and gave."""

    part: Any
    input: Tensor
    output: Tensor


@dataclass(frozen=True, slots=True)
class Rest:
    """What a layer does after attention, by its own modules: `y + factor · block(norm(y))`."""

    norm: nn.Module
    block: nn.Module
    factor: float

    def __call__(self, y: Tensor) -> Tensor:
        """Compute it for `y [1, rows, dim]`."""
        added = self.block(self.norm(y))
        added = added[0] if isinstance(added, tuple) else added  # a mixture may give its router's scores, too
        out: Tensor = y + (added if self.factor == 1.0 else added * self.factor)
        return out


Reading = tuple[LayerParts, Rest | None]
"""What a kernel computes of a layer, and what is left to its modules."""


@dataclass(slots=True)
class Watched:
    """What one layer did in the watched pass: its own call, and the calls of its parts in order.

    Attributes:
        input, output: copies, because a layer may change its input in place, and a model what a layer gave.
        got, gave: these tensors themselves.
        floats: the numbers that the layer holds by itself; one may be a factor.
    """

    input: Tensor | None = None
    got: Tensor | None = None
    gave: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    calls: list[_Call] = field(default_factory=list)
    blocks: list[_Call] = field(default_factory=list)
    floats: tuple[float, ...] = ()

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a layer's call (a forward pre-hook)."""
        self.got = args[0] if args else kwargs["hidden_states"]
        self.input, self.kwargs = self.got.clone(), dict(kwargs)
        self.floats = tuple({value for value in vars(layer).values() if isinstance(value, float)} - {1.0})

    def leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note a layer's result (a forward hook)."""
        self.gave, self.output = output, output.clone() if isinstance(output, Tensor) else output

    def follows(self, other: Watched) -> bool:
        """Tell whether this layer got what another gave, unchanged, and the same cos and sin."""
        angles = [seen.kwargs.get("position_embeddings") or () for seen in (self, other)]
        return (
            self.got is other.gave
            and isinstance(self.input, Tensor)
            and torch.equal(self.input, other.output)
            and len(angles[0]) == len(angles[1])
            and all(a is b for a, b in zip(*angles, strict=True))
        )

    def note(self, part: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Note a part's call (a forward hook)."""
        self.calls.append(_Call(part, args[0], output))

    def note_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note a call of one of the layer's larger modules (a forward hook)."""
        output = output[0] if isinstance(output, tuple) else output
        if len(args) == 1 and isinstance(output, Tensor):
            self.blocks.append(_Call(block, args[0], output))


def parts_of(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer that a kernel can compute."""
    return [m for m in layer.modules() if isinstance(m, NativeLinear | NativeNorm | NativeActivation)]


def blocks_of(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer that have parts of their own: attention, MLP, mixture of experts."""
    return [child for child in layer.children() if next(child.children(), None) is not None]


def readings(seen: Watched, settings: AttentionSettings, shape: LayerShape) -> Iterator[Reading]:
    """Yield what a layer may be, to be tried in turn; nothing if it has other parts, or was not called."""
    embeddings = seen.kwargs.get("position_embeddings")
    if not (isinstance(embeddings, tuple) and len(embeddings) == 2 and isinstance(seen.output, Tensor)):
        return
    order = _Order(seen.calls)
    structure, rest = _whole(order), None
    if structure is None:
        structure, rest = _first_half(order, seen.blocks)
    if structure is None:
        return
    known = embeddings[0].shape[-1]
    rotations = [(2 * known if name == "halves_half" else known, name) for name in PAIRINGS]
    for factor in (1.0, *seen.floats):
        for rotary, pairing in (*rotations, (0, "halves")):
            parts = LayerParts(
                **structure,
                heads=settings.heads,
                kv_heads=shape.heads,
                key_dim=shape.key_dim,
                value_dim=shape.value_dim,
                scale=settings.scale,
                rotary=rotary,
                pairing=pairing,
                window=shape.seen.window,
                chunk=shape.seen.chunk,
                softcap=settings.softcap,
                sinks=None if settings.sinks is None else settings.sinks.float().contiguous(),
                factor=factor,
            )
            yield parts, None if rest is None else Rest(*rest, factor)


class _Order:
    """The calls of a layer's parts, by kind and place."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        self._place = {id(call): place for place, call in enumerate(calls)}
        self.runs = _runs(calls)
        self.norms = [call for call in calls if isinstance(call.part, NativeNorm)]
        self.activations = [call for call in calls if isinstance(call.part, NativeActivation)]

    def norms_between(self, first: _Call | None, last: _Call | None) -> list[_Call]:
        """Return the norms that were called after one part and before another."""
        after = self._place[id(first)] if first else -1
        before = self._place[id(last)] if last else len(self._place)
        return [call for call in self.norms if after < self._place[id(call)] < before]


def _whole(order: _Order) -> dict[str, Any] | None:
    """Return the weights, norms and activation of `LayerParts`; None if it is another kind of layer."""
    runs = order.runs
    if [len(run) for run in runs] not in [[q, 1, g, 1] for q in (1, 3) for g in (1, 2)] or len(order.activations) != 1:
        return None
    qkv, (o,), gate_up, (down,) = runs
    if gate_up[-1].output is order.activations[0].input:  # up is called before gate
        gate_up.reverse()
    middle, ends = order.norms_between(o, gate_up[0]), order.norms_between(down, None)
    mlp = middle.pop() if middle and middle[-1].output is gate_up[0].input else None
    attention = _attention(order)
    if attention is None or len(middle) > 1 or order.norms_between(gate_up[0], down) or len(ends) > 1:
        return None
    return attention | {
        "gate_up": _weights(gate_up),
        "down": down.part.packed,
        "attention_norm": _norm(middle),
        "mlp_norm": _norm([mlp] if mlp else []),
        "output_norm": _norm(ends),
        "activation": order.activations[0].part.kind,
        "parallel": gate_up[0].input is qkv[0].input,
    }


def _first_half(order: _Order, blocks: Sequence[_Call]) -> tuple[dict[str, Any] | None, tuple[nn.Module, nn.Module]]:
    """Return `LayerParts` without an MLP, and the norm and the block that follow; None if there are none."""
    attention = _attention(order)
    after = order.norms_between(order.runs[1][0], None) if attention else []
    for number, norm in enumerate(after[:2]):
        block = next((block for block in blocks if block.input is norm.output), None)
        if attention is not None and block is not None:
            half = attention | {"gate_up": (), "down": None, "attention_norm": _norm(after[:number])}
            return half, (norm.part, block.part)
    return None, (nn.Identity(), nn.Identity())


def _attention(order: _Order) -> dict[str, Any] | None:
    """Return what `LayerParts` has up to attention's last product."""
    if [len(run) for run in order.runs[:2]] not in ([1, 1], [3, 1]):
        return None
    qkv, (o,) = order.runs[:2]
    inputs, heads = order.norms_between(None, qkv[0]), order.norms_between(qkv[0], o)
    if len(inputs) > 1 or len(heads) not in (0, 2):
        return None
    return {
        "qkv": _weights(qkv),
        "o": o.part.packed,
        "input_norm": _norm(inputs),
        "query_norm": _norm(heads[:1]),
        "key_norm": _norm(heads[1:]),
    }


def _runs(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Return the linear layers' calls, those in a row that have the same input together."""
    runs: list[list[_Call]] = []
    for call in calls:
        if not isinstance(call.part, NativeLinear):
            continue
        if runs and runs[-1][0].input is call.input:
            runs[-1].append(call)
        else:
            runs.append([call])
    return runs


def _weights(calls: Sequence[_Call]) -> tuple[Any, ...]:
    return tuple(call.part.packed for call in calls)


def _norm(calls: Sequence[_Call]) -> NormParts | None:
    """Return the norm of a list of at most one."""
    if not calls:
        return None
    norm: Any = calls[0].part
    return NormParts(norm.weight, norm.variance_epsilon, norm.centred)

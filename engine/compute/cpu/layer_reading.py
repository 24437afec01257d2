"""Read what a decoder layer is made of from the calls of its parts in a watched pass. Knows no model by name.

What the parts are, and which input each got, tells almost all. What happens between them (how heads are rotated, whether
something is multiplied before it is added) is tried: `readings` yields what a layer may be, and whoever asked compares bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from engine.compute.backend import AttentionSettings
from engine.compute.cpu.kernel_calls import PAIRINGS
from engine.compute.cpu.layer_kernel import LayerParts, NormParts
from engine.compute.cpu.linear import NativeLinear
from engine.compute.cpu.pointwise import NativeActivation, NativeNorm
from engine.compute.kv_cache import LayerShape

__all__ = ["Watched", "parts_of", "readings"]


@dataclass(frozen=True, slots=True)
class _Call:
    """A part that was called: what it got and gave."""

    part: nn.Module
    input: Tensor
    output: Tensor


@dataclass(slots=True)
class Watched:
    """What one layer did in the watched pass: its own call, and the calls of its parts in order.

    Attributes:
        floats: the numbers that the layer holds by itself; one may be a factor.
    """

    input: Tensor | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    calls: list[_Call] = field(default_factory=list)
    floats: tuple[float, ...] = ()

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a layer's call (a forward pre-hook)."""
        # A copy, because a layer may change its input in place.
        self.input, self.kwargs = (args[0] if args else kwargs["hidden_states"]).clone(), dict(kwargs)
        self.floats = tuple({value for value in vars(layer).values() if isinstance(value, float)} - {1.0})

    def leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note a layer's result (a forward hook)."""
        self.output = output.clone() if isinstance(output, Tensor) else output

    def note(self, part: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Note a part's call (a forward hook)."""
        self.calls.append(_Call(part, args[0], output))


def parts_of(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer that a kernel can compute."""
    return [m for m in layer.modules() if isinstance(m, NativeLinear | NativeNorm | NativeActivation)]


def readings(seen: Watched, settings: AttentionSettings, shape: LayerShape) -> Iterator[LayerParts]:
    """Yield what a layer may be, to be tried in turn; nothing if it has other parts, or was not called."""
    embeddings = seen.kwargs.get("position_embeddings")
    if not (isinstance(embeddings, tuple) and len(embeddings) == 2 and isinstance(seen.output, Tensor)):
        return
    structure = _structure(seen.calls)
    if structure is None:
        return
    rotary = embeddings[0].shape[-1]
    for factor in (1.0, *seen.floats):
        for width, pairing in ((rotary, "halves"), (0, "halves"), *((rotary, name) for name in list(PAIRINGS)[1:])):
            yield LayerParts(
                **structure,
                heads=settings.heads,
                kv_heads=shape.heads,
                key_dim=shape.key_dim,
                value_dim=shape.value_dim,
                scale=settings.scale,
                rotary=width,
                pairing=pairing,
                window=shape.seen.window,
                chunk=shape.seen.chunk,
                softcap=settings.softcap,
                sinks=None if settings.sinks is None else settings.sinks.float().contiguous(),
                factor=factor,
            )


def _structure(calls: Sequence[_Call]) -> dict[str, Any] | None:
    """Return the weights, norms and activation of `LayerParts`; None if it is another kind of layer."""
    runs = _runs(calls)
    activations = [call for call in calls if isinstance(call.part, NativeActivation)]
    if [len(run) for run in runs] not in [[q, 1, g, 1] for q in (1, 3) for g in (1, 2)] or len(activations) != 1:
        return None
    qkv, (o,), gate_up, (down,) = runs
    if gate_up[-1].output is activations[0].input:  # up is called before gate
        gate_up.reverse()
    order = {id(call): place for place, call in enumerate(calls)}
    norms = [call for call in calls if isinstance(call.part, NativeNorm)]

    def between(first: _Call | None, last: _Call | None) -> list[_Call]:
        after, before = order[id(first)] if first else -1, order[id(last)] if last else len(calls)
        return [call for call in norms if after < order[id(call)] < before]

    inputs, heads = between(None, qkv[0]), between(qkv[0], o)
    middle, others, ends = between(o, gate_up[0]), between(gate_up[0], down), between(down, None)
    mlp = middle.pop() if middle and middle[-1].output is gate_up[0].input else None
    if len(inputs) > 1 or len(heads) not in (0, 2) or len(middle) > 1 or others or len(ends) > 1:
        return None
    query, key = heads or (None, None)
    return {
        "qkv": _weights(qkv),
        "o": o.part.packed,
        "gate_up": _weights(gate_up),
        "down": down.part.packed,
        "input_norm": _norm(inputs[0] if inputs else None),
        "attention_norm": _norm(middle[0] if middle else None),
        "mlp_norm": _norm(mlp),
        "output_norm": _norm(ends[0] if ends else None),
        "query_norm": _norm(query),
        "key_norm": _norm(key),
        "activation": activations[0].part.kind,
        "parallel": gate_up[0].input is qkv[0].input,
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


def _norm(call: _Call | None) -> NormParts | None:
    if call is None:
        return None
    norm: Any = call.part
    return NormParts(norm.weight, norm.variance_epsilon, norm.centred)

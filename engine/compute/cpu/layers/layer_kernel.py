"""Decoder layers as one call of a compiled kernel. Knows what a layer is made of; no module of a model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.kernel_calls import ACTIVATIONS, PAIRINGS, Calls, Layer, Norm
from engine.compute.cpu.packed_weight import PackedWeight, Product, checked

_NORMS: Final = ("input_norm", "attention_norm", "mlp_norm", "output_norm", "query_norm", "key_norm")
_NUMBERS: Final = ("heads", "kv_heads", "key_dim", "value_dim", "rotary", "whole", "parallel", "scale", "factor")


@dataclass(frozen=True, slots=True, eq=False)
class NormParts:
    """A norm's `weight [dim] float32`, dense, and epsilon; `centred`: the mean is taken off first."""

    weight: Tensor
    epsilon: float
    centred: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """The parts of a decoder layer: see layers.h for what is computed of them.

    Attributes:
        qkv: three weights, or one whose columns are those of q, k and v in this order; they take one kind of input.
        gate_up: two weights, or one whose columns are those of gate and up in this order; likewise. Without any, and
            without `down`, the result is what comes before the MLP.
        heads, kv_heads, key_dim, value_dim: of attention.
        rotary: how many of a head's dimensions are rotated; pairing: which of them together, one of `PAIRINGS`.
        scale, window, chunk, softcap, sinks: as in `Kernels.attend`.
        input_norm, attention_norm, mlp_norm, output_norm: of attention's input and output, of the MLP's; or None.
        query_norm, key_norm: of each head, or of all heads' numbers together if they are as long; or None.
        activation: one of `ACTIVATIONS`.
        parallel: the MLP's input is attention's, not what attention gave.
        factor: what is added to the residual is first multiplied by this, rounded to float32.
    """

    qkv: tuple[PackedWeight, ...]
    o: PackedWeight
    gate_up: tuple[PackedWeight, ...]
    down: PackedWeight | None
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    rotary: int
    pairing: str = "halves"
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    input_norm: NormParts | None = None
    attention_norm: NormParts | None = None
    mlp_norm: NormParts | None = None
    output_norm: NormParts | None = None
    query_norm: NormParts | None = None
    key_norm: NormParts | None = None
    activation: str = "silu"
    parallel: bool = False
    factor: float = 1.0

    @property
    def angles(self) -> int:
        """How many cos there are for a token."""
        return self.rotary // 2 if self.pairing == "halves_half" else self.rotary

    @property
    def whole(self) -> bool:
        """Whether queries and keys are normed over all heads together."""
        norm = self.query_norm
        return norm is not None and norm.weight.shape[0] != self.key_dim

    def fit(self) -> bool:
        """Tell whether the parts fit together."""
        p, dim, inner = self, self.qkv[0].depth, self.down.depth if self.down else 0
        queries, keys, values = p.heads * p.key_dim, p.kv_heads * p.key_dim, p.kv_heads * p.value_dim
        products = (
            (p.qkv, (queries, keys, values), dim),
            ((p.o,), (dim,), p.heads * p.value_dim),
            *(((p.gate_up, (inner, inner), dim), ((p.down,), (dim,), inner)) if p.down else ()),
        )
        norms = [(norm, dim) for norm in (p.input_norm, p.attention_norm, p.mlp_norm, p.output_norm)]
        norms.append((p.query_norm, queries if p.whole else p.key_dim))
        norms.append((p.key_norm, keys if p.whole else p.key_dim))
        return (
            all(_fit(weights, columns, depth) for weights, columns, depth in products)
            and all(norm is None or tuple(norm.weight.shape) == (size,) for norm, size in norms)
            and (p.down is not None or not (p.gate_up or p.mlp_norm or p.output_norm or p.parallel))
            and (not p.parallel or (p.input_norm is not None and p.mlp_norm is None))
            and p.heads % p.kv_heads == 0
            and p.rotary % 2 == 0
            and 0 <= p.rotary <= p.key_dim
            and (p.sinks is None or tuple(p.sinks.shape) == (p.heads,))
        )


def _fit(weights: tuple[PackedWeight, ...], columns: tuple[int, ...], depth: int) -> bool:
    """Tell whether weights that take one kind of input have these columns: one for each, or one for all."""
    found = tuple(weight.columns for weight in weights)
    return (
        (found == columns or found == (sum(columns),))
        and all(weight.depth == depth for weight in weights)
        and len({weight.input_kind for weight in weights}) == 1
    )


def _norm(parts: NormParts | None) -> Norm:
    return Norm() if parts is None else Norm(parts.weight.data_ptr(), parts.epsilon, parts.centred)


class LayerKernel:
    """A decoder layer as one call, with the bits of its parts called one by one."""

    def __init__(self, calls: Calls, parts: LayerParts) -> None:
        """parts: must fit together (`LayerParts.fit`)."""
        p = parts
        self.angles, self.dim = p.angles, p.o.columns
        products = {
            "qkv": Product(calls, p.qkv),
            "o": Product(calls, [p.o]),
            **({"gate_up": Product(calls, p.gate_up), "down": Product(calls, [p.down])} if p.down else {}),
        }
        self._record = Layer(
            **{name: _norm(getattr(p, name)) for name in _NORMS},
            **{name: product.address for name, product in products.items()},
            **{name: getattr(p, name) for name in _NUMBERS},
            sinks=None if p.sinks is None else p.sinks.data_ptr(),
            dim=self.dim,
            inner=p.down.depth if p.down else 0,
            window=p.window or 0,
            chunk=p.chunk or 0,
            softcap=p.softcap or 0.0,
            qkv_count=len(p.qkv),
            gate_up_count=len(p.gate_up),
            pairing=PAIRINGS[p.pairing],
            activation=ACTIVATIONS[p.activation],
        )
        self.calls, self.address = calls, ctypes.addressof(self._record)
        self.kept = (self._record, parts, products)
        """The memory that the address, and what stands there, points to."""
        self.scratch: int = calls.layer_scratch(self.address)
        self._alone = LayerStack([self])

    def __call__(
        self, plan: AttentionPlan, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Store the step's keys and values and compute the layer: see `LayerStack`."""
        return self._alone(plan, x, cos, sin, [keys], [values])


class LayerStack:
    """Decoder layers one after the other as one call, with the bits of each called by itself."""

    def __init__(self, layers: Sequence[LayerKernel]) -> None:
        """layers: of one width; those that are rotated, by as many angles (`LayerStack.fit`)."""
        first = layers[0]
        self._kept = tuple(layer.kept for layer in layers)  # not the layers: they keep stacks of themselves
        self._addresses = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))
        self._dim, self._angles = first.dim, max(layer.angles for layer in layers)
        self._scratch = max(layer.scratch for layer in layers)
        self._call = first.calls.layers

    @staticmethod
    def fit(layers: Sequence[LayerKernel]) -> bool:
        """Tell whether layers can be one call."""
        widths, angles = {layer.dim for layer in layers}, {layer.angles for layer in layers}
        return len(widths) == 1 and len(angles - {0}) <= 1

    def __call__(
        self,
        plan: AttentionPlan,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """Store the step's keys and values and compute the layers.

        Args:
            x: `[T, dim] float32`; rows beyond the plan's are padding.
            cos, sin: `[T, angles] float32`.
            keys, values: each layer's cache, as in `Kernels.attend`.

        Returns:
            `[T, dim]`.
        """
        rows, attended, angles, count = x.shape[0], len(plan.slots), self._angles, len(self._kept)
        x, cos, sin = checked(x, self._dim), checked(cos[:, :angles], angles), checked(sin[:, :angles], angles)
        if not cos.shape[0] == sin.shape[0] == rows >= attended:
            raise ValueError(f"{rows} rows with {cos.shape[0]} positions, {attended} of which have a place")
        if not len(keys) == len(values) == count or len({part.shape[1] for part in (*keys, *values)}) != 1:
            raise ValueError(f"{count} layers with {len(keys)} caches, all of which must have as many slots")
        out = torch.empty_like(x)
        other = torch.empty_like(x) if count > 1 else out
        pointers = ctypes.c_void_p * count
        self._call(
            self._addresses,
            count,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            other.data_ptr(),
            plan.scratch(rows * self._scratch).data_ptr(),
            pointers(*(part.data_ptr() for part in keys)),
            pointers(*(part.data_ptr() for part in values)),
            plan.slots.data_ptr(),
            plan.finite.data_ptr(),
            ctypes.addressof(plan.parts),
            rows,
            attended,
            keys[0].shape[1],
            len(plan.parts),
            torch.get_num_threads(),
        )
        return out

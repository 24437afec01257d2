"""A decoder layer as one call of a compiled kernel. Knows what a layer is made of; no module of a model."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.kernel_calls import Calls, Layer
from engine.compute.cpu.packed_weight import PackedWeight, Product, checked


@dataclass(frozen=True, slots=True, eq=False)
class NormParts:
    """An RMS norm's `weight [dim] float32`, dense, and epsilon."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """The parts of a decoder layer.

    `x + o(attention(rotary(query_norm(q(n))), rotary(key_norm(k(n))), v(n)))` with `n = first_norm(x)`; then that,
    `y`, plus `down(silu(gate(m)) · up(m))` with `m = second_norm(y)`.

    Attributes:
        q, k, v, o, gate, up, down: weights; q, k and v must be of one kind, gate and up too.
        query_norm, key_norm: of each head, or None.
        rotary: how many of a head's dimensions are rotated, in pairs `i, i + rotary / 2`.
        scale, window, chunk, softcap, sinks: as in `Kernels.attend`.
    """

    first_norm: NormParts
    second_norm: NormParts
    query_norm: NormParts | None
    key_norm: NormParts | None
    q: PackedWeight
    k: PackedWeight
    v: PackedWeight
    o: PackedWeight
    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    heads: int
    kv_heads: int
    rotary: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def key_dim(self) -> int:
        return self.q.columns // self.heads

    @property
    def value_dim(self) -> int:
        return self.v.columns // self.kv_heads

    def fit(self) -> bool:
        """Tell whether the parts fit together."""
        p, dim, inner = self, self.q.depth, self.down.depth
        shapes = (
            (p.q, p.heads * p.key_dim, dim),
            (p.k, p.kv_heads * p.key_dim, dim),
            (p.v, p.kv_heads * p.value_dim, dim),
            (p.o, dim, p.heads * p.value_dim),
            (p.gate, inner, dim),
            (p.up, inner, dim),
            (p.down, dim, inner),
        )
        norms = ((p.first_norm, dim), (p.second_norm, dim), (p.query_norm, p.key_dim), (p.key_norm, p.key_dim))
        return (
            all((weight.columns, weight.depth) == (columns, depth) for weight, columns, depth in shapes)
            and all(norm is None or tuple(norm.weight.shape) == (size,) for norm, size in norms)
            and p.q.kind == p.k.kind == p.v.kind
            and p.gate.kind == p.up.kind
            and p.heads % p.kv_heads == 0
            and p.rotary % 2 == 0
            and 0 <= p.rotary <= p.key_dim
            and (p.sinks is None or tuple(p.sinks.shape) == (p.heads,))
        )


class LayerKernel:
    """A decoder layer as one call, with the bits of its parts called one by one."""

    def __init__(self, calls: Calls, parts: LayerParts) -> None:
        """parts: must fit together (`LayerParts.fit`)."""
        p = parts
        self._rotary, self._dim = p.rotary, p.q.depth
        products = {
            "qkv": Product(calls, [p.q, p.k, p.v]),
            "o": Product(calls, [p.o]),
            "gate_up": Product(calls, [p.gate, p.up]),
            "down": Product(calls, [p.down]),
        }
        self._kept = (parts, products)  # the memory that the record points to
        self._record = Layer(
            **{
                name: None if norm is None else norm.weight.data_ptr()
                for name, norm in (
                    ("first_norm", p.first_norm),
                    ("second_norm", p.second_norm),
                    ("query_norm", p.query_norm),
                    ("key_norm", p.key_norm),
                )
            },
            **{name: product.address for name, product in products.items()},
            **{f"{name}_kind": product.kind for name, product in products.items()},
            sinks=None if p.sinks is None else p.sinks.data_ptr(),
            dim=p.q.depth,
            inner=p.down.depth,
            heads=p.heads,
            kv_heads=p.kv_heads,
            key_dim=p.key_dim,
            value_dim=p.value_dim,
            rotary=p.rotary,
            window=p.window or 0,
            chunk=p.chunk or 0,
            first_epsilon=p.first_norm.epsilon,
            second_epsilon=p.second_norm.epsilon,
            query_epsilon=p.query_norm.epsilon if p.query_norm else 0.0,
            key_epsilon=p.key_norm.epsilon if p.key_norm else 0.0,
            scale=p.scale,
            softcap=p.softcap or 0.0,
        )
        self._address = ctypes.addressof(self._record)
        self._call = calls.layer
        self._scratch = calls.layer_scratch(self._address)

    def __call__(
        self, plan: AttentionPlan, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Store the step's keys and values and compute the layer.

        Args:
            x: `[T, dim] float32`; rows beyond the plan's are padding.
            cos, sin: `[T, rotary] float32`.
            keys, values: the layer's cache, as in `Kernels.attend`.

        Returns:
            `[T, dim]`.
        """
        rows, attended, rotary = x.shape[0], len(plan.slots), self._rotary
        x, cos, sin = checked(x, self._dim), checked(cos[:, :rotary], rotary), checked(sin[:, :rotary], rotary)
        if not cos.shape[0] == sin.shape[0] == rows >= attended:
            raise ValueError(f"{rows} rows with {cos.shape[0]} positions, {attended} of which have a place")
        out = torch.empty_like(x)
        self._call(
            self._address,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            plan.scratch(rows * self._scratch).data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            plan.slots.data_ptr(),
            plan.finite.data_ptr(),
            ctypes.addressof(plan.parts),
            rows,
            attended,
            keys.shape[1],
            len(plan.parts),
            torch.get_num_threads(),
        )
        return out

"""Kernels compiled for the machine at hand. Knows arrays and pointers; nothing of models or layers.

`kernels.c` is compiled once, by the C compiler that is there, and kept (`engine.compute.cpu.kernel_file`). Without a
compiler, or on a processor without AVX2, there are no native kernels: `Kernels.load` says why and torch's own are used
(`engine.compute.linear`). What a kernel promises stands at the top of the C file.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from engine.compute.cpu import kernel_file
from engine.compute.cpu.kernel_calls import Calls, Layer, Matrix, Part
from engine.compute.cpu.kernel_file import KernelsUnavailable
from engine.scheduling.block_pool import BLOCK_SIZE

__all__ = [
    "KINDS",
    "WIDEST_HEAD",
    "AttentionPlan",
    "Kernels",
    "KernelsUnavailable",
    "LayerKernel",
    "LayerParts",
    "NormParts",
    "PackedWeight",
    "Product",
]

_SOURCE: Final = Path(__file__).with_name("kernels.c")

KINDS: Final = {"float32": 0, "bfloat16": 1, "int8": 2}
"""How a packed weight is stored; the numbers of kernels.c."""


WIDEST_HEAD: Final = 256
"""Dimensions of a head that it takes at most."""


class AttentionPlan:
    """What the attention kernel must know of a step, made once for all layers.

    Attributes:
        finite: `[rows] bool`, False where a layer has met a key or a value that is not finite.
    """

    def __init__(self, parts: Sequence[tuple[int, int, int, Sequence[int]]], slots: Tensor) -> None:
        """parts: for each sequence its first row, number of rows, first token and table of blocks (of 16 tokens).

        slots: `[rows] int64`, where each row's key and value go.
        """
        self.slots = slots.contiguous()
        self.finite = torch.ones(len(slots), dtype=torch.bool)
        self.tables = torch.tensor([block for part in parts for block in part[3]], dtype=torch.int32)
        address, records = self.tables.data_ptr(), []
        for row, count, start, table in parts:
            records.append(Part(row, count, start, address, 0))
            address += 4 * len(table)
        self.parts = (Part * len(records))(*records)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def scratch(self, size: int) -> Tensor:
        """`[≥ size] uint8`, the same memory for all layers of a step: fresh pages cost more than what is done there."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight `[columns, depth]` in the kernels' layout, and its bias.

    Attributes:
        kind: `float32`, `bfloat16` (of which no number was rounded) or `int8`.
    """

    data: Tensor
    bias: Tensor | None
    columns: int
    depth: int
    kind: str


class Kernels:
    """The compiled library. Holds no state but its handle."""

    def __init__(self, library: ctypes.CDLL) -> None:
        calls = Calls(library)
        self._linear, self._pack, self._attention = calls.linear, calls.pack, calls.attention
        self._rms_norm, self._silu, self._layer = calls.rms_norm, calls.silu, calls.layer
        self._packed_bytes, self._scratch, self._layer_scratch = calls.packed_bytes, calls.scratch, calls.layer_scratch
        self.lanes = int(calls.lanes())
        """float32 numbers in a vector: 16 with AVX-512, else 8."""
        self.target = str(calls.target().decode())
        """The instructions that they use, for people."""

    @classmethod
    def load(
        cls,
        cache: Path | None = None,
        extra_flags: Sequence[str] = (),
        progress: Callable[[str], None] | None = None,
    ) -> Kernels:
        """The kernels, compiled if need be (six seconds).

        Args:
            cache: the folder for compiled files; default `$XDG_CACHE_HOME/verbatim` or `~/.cache/verbatim`.
            progress: told when they have to be compiled.

        Raises:
            KernelsUnavailable: no compiler, one that fails, or a processor that is not supported.
        """
        if os.name != "posix" or platform.machine() != "x86_64":
            raise KernelsUnavailable(f"there are none for {platform.system()} on {platform.machine()} processors yet")
        capability = torch.backends.cpu.get_cpu_capability()
        if not capability.startswith("AVX"):
            raise KernelsUnavailable("this processor lacks AVX2, or ATEN_CPU_CAPABILITY forbids it")
        # No wider vectors than torch's own: ATEN_CPU_CAPABILITY=avx2 makes a processor an older one, for everything.
        narrow = () if capability == "AVX512" else ("-mno-avx512f",)
        return cls(
            kernel_file.load(
                _SOURCE, cache, (f"-DBLOCK_SIZE={BLOCK_SIZE}", *narrow, *extra_flags), torch.__version__, progress
            )
        )

    def pack(self, weight: Tensor, bias: Tensor | None, kind: str = "exact") -> PackedWeight:
        """`weight [columns, depth]` and `bias [columns]`, any float dtype → the kernels' layout.

        `exact` keeps every number: as bfloat16 if that loses nothing, else as float32. `int8` rounds, see kernels.c.
        """
        weight = weight.detach().to(torch.float32).contiguous()
        bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        columns, depth = weight.shape
        for stored in ("bfloat16", "float32") if kind == "exact" else (kind,):
            number = KINDS[stored]
            data = _memory(self._packed_bytes(columns, depth, number))
            lost = self._pack(weight.data_ptr(), data.data_ptr(), columns, depth, number, torch.get_num_threads())
            if not lost:
                return PackedWeight(data, bias, columns, depth, stored)
        raise AssertionError("float32 holds every float32")

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """`weight · x / √(mean(x²) + epsilon)` over the last dimension. `x` float32, `weight [dim] float32`, dense."""
        dim = weight.shape[0]
        x = _checked(x, dim)
        out = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // dim, dim, epsilon, torch.get_num_threads()
        )
        return out

    def silu(self, x: Tensor) -> Tensor:
        """`x / (1 + exp(-x))`, float32, any shape."""
        x = _checked(x, x.shape[-1])
        out = torch.empty_like(x)
        self._silu(x.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads())
        return out

    def can_attend(self, key_dim: int, value_dim: int) -> bool:
        """Whether there is a kernel for heads of these dimensions."""
        return key_dim <= WIDEST_HEAD and value_dim <= WIDEST_HEAD and value_dim % self.lanes == 0

    def attend(
        self,
        plan: AttentionPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Store a step's keys and values, then attend. All tensors float32.

        Args:
            query: `[heads, T, key_dim]`, key: `[kv_heads, T, key_dim]`, value: `[kv_heads, T, value_dim]`, the last
                dimension dense. Rows beyond the plan's are padding: theirs is a result of zeros.
            keys, values: the cache, `[kv_heads, slots, dim]`; each block of 16 keys is transposed, `[dim, 16]`.
            window: tokens seen, the query's own included; chunk: the length of a chunk, out of which no token looks;
            softcap: bound of the scores; sinks: `[heads]`.

        Returns:
            `[T, heads, value_dim]`.
        """
        heads, total, key_dim = query.shape
        kv_heads, _, value_dim = value.shape
        rows = len(plan.slots)
        if {t.dtype for t in (query, key, value)} != {torch.float32}:
            raise TypeError(f"the kernels take float32, not {query.dtype}, {key.dtype} and {value.dtype}")
        query, key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
        out = torch.empty(total, heads, value_dim)
        out[rows:] = 0
        self._attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            out.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            plan.slots.data_ptr(),
            plan.finite.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            ctypes.addressof(plan.parts),
            rows,
            heads,
            kv_heads,
            key_dim,
            value_dim,
            keys.shape[1],
            len(plan.parts),
            window or 0,
            chunk or 0,
            scale,
            softcap or 0.0,
            torch.get_num_threads(),
        )
        return out

    def group(self, weights: Sequence[PackedWeight]) -> Product:
        """One product of an input with several weights of one kind and depth."""
        return Product(self, weights)

    def can_compute(self, parts: LayerParts) -> bool:
        """Whether the parts fit together, and there is a kernel for heads of their size."""
        p, dim, inner = parts, parts.q.depth, parts.down.depth
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
            and self.can_attend(p.key_dim, p.value_dim)
        )

    def layer(self, parts: LayerParts) -> LayerKernel:
        """A whole decoder layer as one call."""
        return LayerKernel(self, parts)


class Product:
    """`x @ weight.T + bias` for several weights at once: the input is read, and for int8 rounded, once.

    Attributes:
        columns: of each weight; depth: theirs; kind: how they are stored, a number of `KINDS`; address: of their table.
    """

    def __init__(self, kernels: Kernels, weights: Sequence[PackedWeight]) -> None:
        first = weights[0]
        if any((w.kind, w.depth) != (first.kind, first.depth) for w in weights):
            raise ValueError("weights of one product must have one kind and depth")
        self.weights = tuple(weights)  # keeps the memory that the table points to
        self.columns = tuple(w.columns for w in weights)
        self.depth, self.kind = first.depth, KINDS[first.kind]
        self._call = kernels._linear
        self._scratch = kernels._scratch(self.depth, self.kind)
        self._table = (Matrix * len(weights))(
            *(Matrix(w.data.data_ptr(), None if w.bias is None else w.bias.data_ptr(), w.columns) for w in weights)
        )
        self.address = ctypes.addressof(self._table)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """`x [rows, depth] float32` → for each weight `[rows, columns] float32`. Neighbouring rows never matter."""
        rows, x = x.shape[0], _checked(x, self.depth)
        size = rows * sum(self.columns)
        # One allocation: results, then the kernel's scratch space.
        out = torch.empty(size + -(-rows * self._scratch // 4), dtype=torch.float32)
        start = out.data_ptr()
        self._call(
            x.data_ptr(),
            start + 4 * size,
            start,
            self.address,
            rows,
            self.depth,
            len(self.columns),
            self.kind,
            torch.get_num_threads(),
        )
        parts, at = [], 0
        for columns in self.columns:
            parts.append(out[at : at + rows * columns].view(rows, columns))
            at += rows * columns
        return parts


@dataclass(frozen=True, slots=True, eq=False)
class NormParts:
    """An RMS norm's `weight [dim] float32`, dense, and epsilon."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """What a decoder layer is made of.

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


class LayerKernel:
    """A decoder layer as one call, with the bits of its parts called one by one."""

    def __init__(self, kernels: Kernels, parts: LayerParts) -> None:
        """Raises ValueError: see `Kernels.can_compute`."""
        if not kernels.can_compute(parts):
            raise ValueError("these parts are no layer that there is a kernel for")
        p = parts
        self._rotary, self._dim = p.rotary, p.q.depth
        products = {
            "qkv": kernels.group([p.q, p.k, p.v]),
            "o": kernels.group([p.o]),
            "gate_up": kernels.group([p.gate, p.up]),
            "down": kernels.group([p.down]),
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
        self._call = kernels._layer
        self._scratch = kernels._layer_scratch(self._address)

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
        x, cos, sin = _checked(x, self._dim), _checked(cos[:, :rotary], rotary), _checked(sin[:, :rotary], rotary)
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


def _checked(x: Tensor, last: int) -> Tensor:
    """Dense, or an error: behind a pointer there is nobody who would notice."""
    if x.dtype != torch.float32 or x.shape[-1] != last or x.device.type != "cpu":
        raise TypeError(f"the kernels take float32 [..., {last}] on a CPU, not {x.dtype} {list(x.shape)} on {x.device}")
    return x.contiguous()


def _memory(size: int) -> Tensor:
    """`[size] uint8` of fresh memory in huge pages, where the system has them: weights are read from end to end."""
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)

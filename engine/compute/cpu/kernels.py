"""Call the kernels that are compiled for this machine. Knows arrays and pointers; nothing of models or layers.

`kernels.c` is compiled once, by the machine's C compiler, and the result is kept (`engine.compute.cpu.kernel_file`).
There are none without a compiler, or on a processor with neither AVX2 nor ARM's 64 bits: `Kernels.load` says why, and
torch computes.
The top of the C file says what every kernel promises.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from engine.compute.cpu import kernel_file
from engine.compute.cpu.attention_plan import AttentionPlan
from engine.compute.cpu.kernel_calls import ACTIVATIONS, Calls
from engine.compute.cpu.kernel_file import NoKernels
from engine.compute.cpu.layers.experts_kernel import ExpertsKernel
from engine.compute.cpu.layers.layer_kernel import LayerKernel, LayerParts
from engine.compute.cpu.matrix_unit import NO_UNIT, MatrixUnit, choose_matrix_unit
from engine.compute.cpu.packed_weight import (
    Columns,
    PackedWeight,
    Pieces,
    Product,
    checked,
    pack_groups,
    pack_pieces,
    pack_weight,
    round_pieces,
    widen,
)
from engine.compute.processor import ARM
from engine.compute.whole.groups import Groups
from engine.scheduling.block_pool import BLOCK_SIZE

__all__ = ["WIDEST_HEAD", "Kernels", "NoKernels"]

_SOURCE: Final = Path(__file__).parent / "native" / "kernels.c"

WIDEST_HEAD: Final = 256
"""The most dimensions of a head that the attention kernel takes."""


def _instructions() -> Sequence[str]:
    """Return the flags for what the kernels must not use here. Raises NoKernels: the processor lacks what they need."""
    machine = platform.machine()
    if os.name == "posix" and machine in ARM:  # every such processor has what they need
        return ()
    if os.name != "posix" or machine != "x86_64":
        raise NoKernels(f"there are none for {platform.system()} on {machine} processors yet")
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        raise NoKernels("this processor lacks AVX2, or ATEN_CPU_CAPABILITY forbids it")
    # No wider vectors than torch's own, so that ATEN_CPU_CAPABILITY=avx2 holds for everything.
    return () if capability == "AVX512" else ("-mno-avx512f", "-DVERBATIM_NO_MATRIX_UNIT")


def _digest(file: Path) -> str:
    try:
        return f"{file.stem} {hashlib.sha256(file.read_bytes()).hexdigest()}"
    except OSError:  # compiled for this process alone, and gone
        return file.stem


class Kernels:
    """The compiled library: its functions, called with tensors. Holds no state but its handle."""

    def __init__(self, library: ctypes.CDLL, matrix_unit: MatrixUnit = NO_UNIT) -> None:
        self._calls = calls = Calls(library)
        self.lanes = int(calls.lanes())
        """float32 numbers in a vector: 16 with AVX-512, else 8."""
        self.target = str(calls.target().decode())
        """The instruction set that the kernels use, for people."""
        self.digest = _digest(Path(getattr(library, "_name", "")))
        """Of the compiled file, and its name: source, compiler, flags and processor are in that."""
        self.matrix_unit = matrix_unit
        """Whether products of many rows use the processor's matrix unit, and why not."""

    @classmethod
    def load(
        cls,
        cache: Path | None = None,
        extra_flags: Sequence[str] = (),
        progress: Callable[[str], None] | None = None,
    ) -> Kernels:
        """Load the kernels, compiled first if need be (some twenty seconds).

        Args:
            cache: the folder for compiled files; default `$XDG_CACHE_HOME/verbatim` or `~/.cache/verbatim`.
            progress: told when they have to be compiled.

        Raises:
            NoKernels: no compiler, one that fails, or a processor that is not supported.
        """

        def made(library: ctypes.CDLL, file: Path) -> Kernels:
            return cls(library, choose_matrix_unit(Calls(library), file, progress))

        flags = (f"-DBLOCK_SIZE={BLOCK_SIZE}", *_instructions(), *extra_flags)
        return kernel_file.load(_SOURCE, cache, flags, progress, made)

    def pack(self, weight: Tensor, bias: Tensor | None, kind: str = "exact") -> PackedWeight:
        """Bring `weight [columns, depth]` and `bias [columns]` into the kernels' layout: see `pack_weight`."""
        return pack_weight(self._calls, weight, bias, kind)

    def pack_pieces(self, read: Columns, pieces: Pieces, columns: int, depth: int, kind: str = "exact") -> PackedWeight:
        """Pack a weight of which only some columns are read at a time: see `packed_weight.pack_pieces`."""
        return pack_pieces(self._calls, read, pieces, columns, depth, kind)

    def pack_groups(self, groups: Groups, bias: Tensor | None) -> PackedWeight:
        """Bring whole numbers in groups and `bias [columns]` into the kernels' layout; no number changes."""
        return pack_groups(self._calls, groups, bias)

    def round(self, read: Columns, pieces: Pieces, columns: int, depth: int, bits: int) -> Groups:
        """Round a weight of which only some columns are read at a time: see `packed_weight.round_pieces`."""
        return round_pieces(self._calls, read, pieces, columns, depth, bits)

    def widen(self, packed: PackedWeight, columns: Tensor | None = None) -> Tensor:
        """Return the numbers that a packed weight stands for: `[columns, depth] float32`, or those of some columns.

        Args:
            columns: `[n] int64`, in any order.
        """
        return widen(self._calls, packed, columns)

    def norm(self, x: Tensor, weight: Tensor, epsilon: float, *, centred: bool = False) -> Tensor:
        """Compute `weight · x / √(mean(x²) + epsilon)` over the last dimension. `x`, `weight [dim]`: float32, dense.

        Args:
            centred: take the mean off `x` first.
        """
        dim = weight.shape[0]
        x = checked(x, dim)
        out = torch.empty_like(x)
        rows, threads = x.numel() // dim, torch.get_num_threads()
        self._calls.norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, dim, epsilon, centred, threads)
        return out

    def activate(self, x: Tensor, kind: str) -> Tensor:
        """Compute an activation, one of `ACTIVATIONS`. `x`: float32, any shape.

        `silu`: `x / (1 + exp(-x))`; `gelu_tanh`: `x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2`;
        `clamped`: `y / (1 + exp(-1.702 · y))`, `y = min(x, 7)`.
        """
        x = checked(x, x.shape[-1])
        out = torch.empty_like(x)
        self._calls.activate(x.data_ptr(), out.data_ptr(), x.numel(), ACTIVATIONS[kind], torch.get_num_threads())
        return out

    def can_attend(self, key_dim: int, value_dim: int) -> bool:
        """Tell whether there is a kernel for heads of these dimensions."""
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
                dimension dense. Rows beyond the plan's are padding: their results are zeros.
            keys, values: the cache, `[kv_heads, slots, dim]`; each block of 16 keys is transposed, `[dim, 16]`.
            window: tokens seen, the query's own included; chunk: its length; no token sees another chunk's keys;
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
        out = torch.empty(total, heads, value_dim, dtype=torch.float32)
        out[rows:] = 0
        self._calls.attention(
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
        """Combine several weights of one depth, and one kind of input, into one product."""
        return Product(self._calls, weights)

    def can_compute(self, parts: LayerParts) -> bool:
        """Tell whether the parts fit together, and there is a kernel for heads of their size."""
        return parts.fit() and self.can_attend(parts.key_dim, parts.value_dim)

    def layer(self, parts: LayerParts) -> LayerKernel:
        """Build a kernel that computes a whole decoder layer. Raises ValueError if `can_compute` returns False."""
        if not self.can_compute(parts):
            raise ValueError("these parts are no layer that there is a kernel for")
        return LayerKernel(self._calls, parts)

    def experts(self, gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], activation: str) -> ExpertsKernel:
        """Build a kernel that computes a mixture of experts: see `ExpertsKernel`."""
        return ExpertsKernel(self._calls, gate_up, down, activation)

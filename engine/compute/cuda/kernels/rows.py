"""Kernels that treat each row by itself: norms, activations, what goes into the cache. Knows no model and no step.

One program computes a row, in one order that depends on the row's length alone. Nothing is contracted to fused
multiply-adds, so that the bits are those of the formula as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.compute.cuda.operations import NormKind
from engine.scheduling.block_pool import BLOCK_SIZE

_ALIGNED = 16
"""Triton compiles another kernel for addresses and strides that are no multiple of it, which may sum in another order.

So a row is computed by one kernel, whether it is a part of a wider tensor or not."""


@triton.jit
def _rms_norm(
    x, weight, out, size, inverse, epsilon, outer, inner, INNER: tl.constexpr, PAD: tl.constexpr, ADD_ONE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PAD)
    inside = at < size
    source = x + (row // INNER) * outer + (row % INNER) * inner
    numbers = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    # torch multiplies a sum by 1 / size on a GPU; it divides on a CPU.
    numbers = numbers * tl.rsqrt(tl.sum(numbers * numbers, 0) * inverse + epsilon)
    result = numbers * (1.0 + scale) if ADD_ONE else numbers.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + row * size + at, result.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, kind: NormKind) -> Tensor:
    """Normalise the last dimension, as `engine.compute.cuda.operations.Operations.rms_norm` says.

    Args:
        x: `[rows, n]`, or `[rows, heads, n]` to normalise heads one by one; the last dimension contiguous.

    Returns:
        The same shape, contiguous.
    """
    assert x.dim() in (2, 3)
    assert x.stride(-1) == 1
    assert weight.is_contiguous()
    size = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    if x.data_ptr() % _ALIGNED or any(stride % _ALIGNED for stride in x.stride()[:-1]):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pad = triton.next_power_of_2(size)
    _rms_norm[(x.shape[0] * heads,)](
        x,
        weight,
        out,
        size,
        1.0 / size,
        epsilon,
        x.stride(0) if x.shape[0] > 1 else size * heads,  # torch gives a single row any stride
        x.stride(1) if heads > 1 else size,
        INNER=heads,
        PAD=pad,
        ADD_ONE=kind == "one plus weight",
        num_warps=min(max(pad // 512, 1), 16),
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _silu_mul(gate_up, out, size, stride, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PAD + tl.arange(0, PAD)
    inside = at < size
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + at, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + at, (activated * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute `silu(gate) * up`, as `engine.compute.cuda.operations.Operations.silu_mul` says.

    Args:
        gate_up: `[rows, 2 n]`, the last dimension contiguous.
    """
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    assert gate_up.shape[1] == 2 * size
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    pad = min(triton.next_power_of_2(size), 1024)
    grid = (rows, triton.cdiv(size, pad))
    _silu_mul[grid](gate_up, out, size, gate_up.stride(0), PAD=pad, num_warps=4, enable_fp_fusion=False)
    return out


@triton.jit
def _load_heads(source, row, first, row_stride, head_stride, HEADS, DIM, STEP: tl.constexpr, PAD: tl.constexpr):
    """Load a row's numbers of the heads `first … first + STEP - 1`: `[STEP, PAD]`, and which of them there are."""
    head, at = first + tl.arange(0, STEP), tl.arange(0, PAD)
    inside = (head[:, None] < HEADS) & (at[None, :] < DIM)
    address = source + row * row_stride + head[:, None].to(tl.int64) * head_stride + at[None, :]
    return tl.load(address, mask=inside, other=0.0), inside


@triton.jit
def _store_heads(target, numbers, inside, slot, first, head_stride, DIM, STEP: tl.constexpr, PAD: tl.constexpr):
    head, at = first + tl.arange(0, STEP), tl.arange(0, PAD)
    address = target + head[:, None].to(tl.int64) * head_stride + slot * DIM + at[None, :]
    tl.store(address, numbers.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _all_finite(numbers):
    """Whether no number is infinite or NaN, of which every comparison is false."""
    return tl.min(tl.min((tl.abs(numbers.to(tl.float32)) < float("inf")).to(tl.int32), 1), 0)


@triton.jit(do_not_specialize_on_alignment=["slots", "num_rows", "finite"])
def _store(
    key,
    value,
    keys,
    values,
    slots,
    num_rows,
    finite,
    key_row,
    key_head,
    value_row,
    value_head,
    keys_head,
    values_head,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Store a row, once all of its heads are known to be finite: they are read twice, `STEP` heads at a time."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(num_rows):
        fine = 1
        for first in range(0, HEADS, STEP):
            new, _ = _load_heads(key, row, first, key_row, key_head, HEADS, KEY_DIM, STEP, KEY_PAD)
            fine = tl.minimum(fine, _all_finite(new))
            new, _ = _load_heads(value, row, first, value_row, value_head, HEADS, VALUE_DIM, STEP, VALUE_PAD)
            fine = tl.minimum(fine, _all_finite(new))
        slot = tl.load(slots + row)
        for first in range(0, HEADS, STEP):
            new, inside = _load_heads(key, row, first, key_row, key_head, HEADS, KEY_DIM, STEP, KEY_PAD)
            new = tl.where(fine == 1, new, 0.0)
            _store_heads(keys, new, inside, slot, first, keys_head, KEY_DIM, STEP, KEY_PAD)
            new, inside = _load_heads(value, row, first, value_row, value_head, HEADS, VALUE_DIM, STEP, VALUE_PAD)
            new = tl.where(fine == 1, new, 0.0)
            _store_heads(values, new, inside, slot, first, values_head, VALUE_DIM, STEP, VALUE_PAD)
        if fine == 0:
            tl.store(finite + row, 0)


def store(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, num_rows: Tensor, finite: Tensor
) -> None:
    """Write a step's keys and values into the cache, as `engine.compute.cuda.operations.Operations.store` says."""
    heads, rows, key_dim = key.shape
    value_dim = value.shape[2]
    for new, cache in ((key, keys), (value, values)):
        assert new.stride(2) == 1
        assert new.dtype == cache.dtype
        assert cache.stride()[1:] == (new.shape[2], 1)
    pads = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    _store[(rows,)](
        key,
        value,
        keys,
        values,
        slots,
        num_rows,
        finite,
        key.stride(1),
        key.stride(0),
        value.stride(1),
        value.stride(0),
        keys.stride(0),
        values.stride(0),
        HEADS=heads,
        STEP=min(triton.next_power_of_2(heads), max(4096 // max(pads), 1)),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_PAD=pads[0],
        VALUE_PAD=pads[1],
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=["pairs", "num_pairs"])
def _copy_blocks(tensors, pairs, num_pairs, WORDS: tl.constexpr):
    """Copy all blocks of one head of one tensor, pair after pair: each thread reads only what it wrote itself."""
    entry = tensors + tl.program_id(0) * 4
    if tl.program_id(1) < tl.load(entry + 3):
        words = tl.multiple_of(tl.load(entry + 2), 4)  # 16 tokens of 16 bits or more: eight words at least
        head = tl.load(entry) + tl.program_id(1) * tl.load(entry + 1)
        memory = tl.multiple_of(head, 16).to(tl.pointer_type(tl.int32))
        at = tl.arange(0, WORDS)
        for pair in range(0, tl.load(num_pairs)):
            source, target = tl.load(pairs + pair * 2).to(tl.int64), tl.load(pairs + pair * 2 + 1).to(tl.int64)
            block = tl.load(memory + source * words + at, mask=at < words, other=0)
            tl.store(memory + target * words + at, block, mask=at < words)
            tl.debug_barrier()


class CacheTable:
    """The tensors of a cache as a table in device memory, so that one launch reaches all of them.

    Attributes:
        entries: `[tensors, 4] int64`: address, bytes from head to head, words of 4 bytes in a block, heads.
        heads: of the tensor with most; words: in a block of the tensor with the largest.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Describe tensors of `[heads, slots, dim]` on one device. Copies the table there: not during a capture."""
        rows = []
        for tensor in tensors:
            assert tensor.stride()[1:] == (tensor.shape[2], 1)
            words = BLOCK_SIZE * tensor.shape[2] * tensor.element_size() // 4
            rows.append((tensor.data_ptr(), tensor.stride(0) * tensor.element_size(), words, tensor.shape[0]))
        self.entries = torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)
        self.heads = max(row[3] for row in rows)
        self.words = max(row[2] for row in rows)


def copy_blocks(table: CacheTable, pairs: Tensor, num_pairs: Tensor) -> None:
    """Copy whole blocks, as `engine.compute.cuda.operations.Operations.copy_blocks` says."""
    grid = (table.entries.shape[0], table.heads)
    _copy_blocks[grid](table.entries, pairs, num_pairs, WORDS=triton.next_power_of_2(table.words), num_warps=4)

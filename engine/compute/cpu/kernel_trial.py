"""Call every function of a compiled kernel library once, or multiply on the matrix unit, in a process that may crash.

Started by `engine.compute.cpu.kernel_file`. Imports no torch, so that it is quick: the numbers are arrays of ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from typing import Any, Final

from engine.compute.cpu.kernel_calls import (
    ACTIVATIONS,
    Calls,
    Experts,
    Format,
    GroupParts,
    Layer,
    Matrix,
    Norm,
    Part,
)
from engine.scheduling.block_pool import BLOCK_SIZE

__all__ = ["REFUSED", "main", "matrix"]

REFUSED: Final = 75
"""Exit status where the system refuses what is to be tried: another process may be granted it."""

_DEPTH, _COLUMNS, _ROWS, _THREADS = 130, 40, 7, 2
_MANY: Final = 41  # rows: more than the matrix unit asks for, and no whole number of its tiles
_FORMATS: Final = ((4, 32), (5, 64), (6, 16), (8, 128))  # bits of numbers, and how many are a group
_HEAD = 16


def main(library: str) -> None:
    """Load a compiled file and try it. Exits with 1 if a result is wrong."""
    calls = _load(library)
    calls.target()
    calls.matrix_unit(0)
    for kind in (0, 1, 2):
        _expect(f"a product of kind {kind}", _product(calls, kind), _DEPTH * 0.5, tolerance=1.0)
    for bits, group in _FORMATS:
        product, wide = _grouped(calls, bits, group)
        _expect(f"a product with groups of {group} numbers of {bits} bits", product, _DEPTH * 0.5, tolerance=1.0)
        _expect(f"a widened number of {bits} bits", wide, 0.5)
    for bits, most in ((4, 15), (6, 63)):
        _expect(f"a number rounded to {bits} bits", _rounded(calls, bits), most)
    _expect("attention", _attention(calls), 1.0)
    _expect("a norm", _norm(calls, centred=False), 1.0)
    _expect("a centred norm", _norm(calls, centred=True), 0.0)
    for name, right in (("silu", 1 / (1 + math.exp(-1))), ("gelu_tanh", 0.841192), ("clamped", 0.845796)):
        _expect(name, _activation(calls, name), right)
    _expect("a mixture of experts", _experts(calls), 0.3, tolerance=0.1)
    _layer(calls)


def matrix(library: str) -> None:
    """Multiply on the processor's matrix unit: with the bits of other instructions. Exits with 1 if they differ, with
    `REFUSED` if the system does not let this process use it.
    """
    calls = _load(library)
    wanted = _many_rows(calls)
    if refused := calls.matrix_unit(1):
        print(f"the system refuses it: {os.strerror(refused)}", file=sys.stderr)
        sys.exit(REFUSED)
    for name, product in _many_rows(calls).items():
        if product != wanted[name]:
            sys.exit(f"a product of {name} has other bits on the matrix unit")


def _many_rows(calls: Calls) -> dict[str, bytes]:
    """Make a product of each kind that the matrix unit has, with more rows than it asks for."""
    out = {"int8": bytes(_product(calls, 2, _MANY, varied=True))}
    for bits, group in _FORMATS:
        product, _ = _grouped(calls, bits, group, _MANY, varied=True)
        out[f"groups of {group} numbers of {bits} bits"] = bytes(product)
    return out


def _load(library: str) -> Calls:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may crash, and a core dump would be of no use
    try:
        return Calls(ctypes.CDLL(library))
    except (OSError, AttributeError) as error:
        sys.exit(str(error))


def _expect(what: str, found: Any, wanted: float, tolerance: float = 1e-3) -> None:
    wrong = next((number for number in found if not abs(number - wanted) <= tolerance), None)
    if wrong is not None:
        sys.exit(f"{what} is {wrong:g}, not {wanted:g}")


def _ones(count: int, value: float = 1.0) -> Any:
    return (ctypes.c_float * count)(*[value] * count)


def _varied(count: int) -> Any:
    """Numbers of which neighbours differ, whole eighths: no row and no column is like another."""
    return (ctypes.c_float * count)(*((i * i * 37 % 1009 - 504) / 8 for i in range(count)))


def _packed(calls: Calls, columns: int, depth: int, kind: int, value: float = 0.5) -> Any:
    return _pack(calls, _ones(columns * depth, value), columns, depth, kind)


def _pack(calls: Calls, numbers: Any, columns: int, depth: int, kind: int) -> Any:
    out = ctypes.create_string_buffer(int(calls.packed_bytes(columns, depth, kind, None)))
    calls.pack(numbers, out, columns, depth, kind, _THREADS)
    return out


def _matrices(*weights: tuple[Any, int], kind: int = 0) -> Any:
    return (Matrix * len(weights))(
        *(Matrix(ctypes.addressof(data), None, columns, None, kind) for data, columns in weights)
    )


def _product(calls: Calls, kind: int, rows: int = _ROWS, *, varied: bool = False) -> Any:
    numbers = _varied(_COLUMNS * _DEPTH) if varied else _ones(_COLUMNS * _DEPTH, 0.5)
    weight = _pack(calls, numbers, _COLUMNS, _DEPTH, kind)
    scratch = ctypes.create_string_buffer(rows * int(calls.scratch(_DEPTH, kind)))
    out, x = _ones(rows * _COLUMNS, 0.0), (_varied if varied else _ones)(rows * _DEPTH)
    table = _matrices((weight, _COLUMNS), kind=kind)
    calls.linear(x, scratch, out, table, rows, _DEPTH, 1, _THREADS)
    return out


def _grouped(calls: Calls, bits: int, group: int, rows: int = _ROWS, *, varied: bool = False) -> tuple[Any, Any]:
    """Multiply with numbers of 2, of which 1 is taken off as the zero, and a half as the minimum; and widen some.

    Args:
        varied: with numbers of which neighbours differ.
    """
    groups, count = -(-_DEPTH // group), _COLUMNS * _DEPTH
    numbers = (ctypes.c_uint8 * count)(*(i * i * 29 % 251 % 2**bits if varied else 2 for i in range(count)))
    halves = _ones(_COLUMNS * groups, 0.5)
    scales, zeros = (
        (ctypes.c_uint8 * (_COLUMNS * groups))(*[2] * (_COLUMNS * groups)),
        (ctypes.c_uint8 * (_COLUMNS * groups))(*[1] * (_COLUMNS * groups)),
    )
    layout = Format(bits, group, 1, 0, 4, 3, 3, 0, 4)
    parts = GroupParts(
        *(ctypes.addressof(part) for part in (numbers, scales, halves, halves)), None, ctypes.addressof(zeros)
    )
    weight = ctypes.create_string_buffer(int(calls.packed_bytes(_COLUMNS, _DEPTH, 3, ctypes.byref(layout))))
    calls.pack_groups(ctypes.byref(layout), ctypes.byref(parts), weight, _COLUMNS, _DEPTH, _THREADS)
    table = (Matrix * 1)(Matrix(ctypes.addressof(weight), None, _COLUMNS, ctypes.addressof(layout), 3))
    scratch = ctypes.create_string_buffer(rows * int(calls.scratch(_DEPTH, 3)))
    out, wide = _ones(rows * _COLUMNS, 0.0), _ones(_ROWS * _DEPTH, 0.0)
    x = (_varied if varied else _ones)(rows * _DEPTH)
    calls.linear(x, scratch, out, table, rows, _DEPTH, 1, _THREADS)
    calls.widen(table, (ctypes.c_int64 * _ROWS)(*range(_ROWS)), wide, _DEPTH, _ROWS, _THREADS)
    return out, wide


def _rounded(calls: Calls, bits: int) -> Any:
    """Round ones to the largest number of their bits."""
    size, of = _COLUMNS * _DEPTH, _COLUMNS * _DEPTH  # more than there are groups
    numbers, parts = (ctypes.c_uint8 * size)(), [(ctypes.c_uint16 * of)() for _ in range(4)]
    if calls.round(_ones(size), numbers, *parts, _COLUMNS, _DEPTH, bits, _THREADS):
        sys.exit("rounding refuses finite numbers")
    return numbers


def _step(rows: int) -> tuple[Any, Any, Any, Any]:
    """Make one sequence's step: slots, which rows are finite, the block table, and the part."""
    slots, finite = (ctypes.c_int64 * rows)(*range(rows)), (ctypes.c_uint8 * rows)(*[1] * rows)
    table = (ctypes.c_int32 * 1)(0)
    return slots, finite, table, (Part * 1)(Part(0, rows, 0, ctypes.addressof(table), 0))


def _attention(calls: Calls) -> Any:
    rows, heads = 3, 2
    slots, finite, _table, parts = _step(rows)
    query, key, value = _ones(heads * rows * _HEAD), _ones(rows * _HEAD), _ones(rows * _HEAD)
    out, keys, values = _ones(rows * heads * _HEAD, 0.0), _ones(BLOCK_SIZE * _HEAD, 0.0), _ones(BLOCK_SIZE * _HEAD, 0.0)
    strides = [rows * _HEAD, _HEAD] * 3
    sizes = [rows, heads, 1, _HEAD, _HEAD, BLOCK_SIZE, 1, 0, 0]
    calls.attention(
        query, key, value, *strides, out, keys, values, slots, finite, None, parts, *sizes, 0.25, 0.0, _THREADS
    )
    return out


def _norm(calls: Calls, centred: bool) -> Any:
    out = _ones(512 * _DEPTH, 2.0)
    calls.norm(_ones(512 * _DEPTH), _ones(_DEPTH), out, 512, _DEPTH, 1e-6, centred, _THREADS)
    return out


def _activation(calls: Calls, kind: str) -> Any:
    out = _ones(10_000, 0.0)
    calls.activate(_ones(10_000), out, 10_000, ACTIVATIONS[kind], _THREADS)
    return out


def _layer(calls: Calls) -> None:
    rows, dim, inner, heads = 3, 2 * _HEAD, 48, 2
    weights = {
        "qkv": [(heads * _HEAD, dim), (_HEAD, dim), (_HEAD, dim)],
        "o": [(dim, heads * _HEAD)],
        "gate_up": [(inner, dim), (inner, dim)],
        "down": [(dim, inner)],
    }
    packed = {
        name: [(_packed(calls, columns, depth, 0, 0.01), columns) for columns, depth in shapes]
        for name, shapes in weights.items()
    }
    tables = {name: _matrices(*products) for name, products in packed.items()}
    norm = _ones(dim)
    record = Layer(
        **{name: ctypes.addressof(table) for name, table in tables.items()},
        input_norm=Norm(ctypes.addressof(norm), 1e-6, 0),
        mlp_norm=Norm(ctypes.addressof(norm), 1e-6, 0),
        qkv_count=3,
        gate_up_count=2,
        dim=dim,
        inner=inner,
        heads=heads,
        kv_heads=1,
        key_dim=_HEAD,
        value_dim=_HEAD,
        rotary=_HEAD,
        scale=0.25,
        factor=1.0,
    )
    slots, finite, _table, parts = _step(rows)
    scratch = ctypes.create_string_buffer(rows * int(calls.layer_scratch(ctypes.byref(record))))
    out, other, angles = _ones(rows * dim, 0.0), _ones(rows * dim, 0.0), _ones(rows * _HEAD)
    caches = [_ones(BLOCK_SIZE * _HEAD, 0.0) for _ in range(4)]
    layers, keys, values = (
        (ctypes.c_void_p * 2)(*map(ctypes.addressof, both)) for both in ((record, record), caches[:2], caches[2:])
    )
    calls.layers(
        layers, 2, _ones(rows * dim), angles, angles, out, other, scratch, keys, values, slots, finite, parts,
        rows, rows, BLOCK_SIZE, 1, _THREADS,
    )  # fmt: skip
    if not all(math.isfinite(number) for number in out):
        sys.exit("a layer's numbers are not finite")


def _experts(calls: Calls) -> Any:
    rows, choices, dim, inner = 3, 2, 32, 16
    groups = [
        [_packed(calls, columns, depth, 0, 0.03) for _ in range(2)] for columns, depth in ((32, dim), (dim, inner))
    ]
    tables = [_matrices(*((data, 32) for data in group)) for group in groups]
    record = Experts(*map(ctypes.addressof, tables), dim=dim, inner=inner, experts=2, row_bytes=256, activation=0)
    scratch = ctypes.create_string_buffer(int(calls.experts_scratch(ctypes.byref(record), rows, choices)))
    out, chosen = _ones(rows * dim, 0.0), (ctypes.c_int64 * (rows * choices))(0, 1, 1, 0, 0, 1)
    weights = _ones(rows * choices, 0.5)
    calls.experts(ctypes.byref(record), _ones(rows * dim), chosen, weights, out, scratch, rows, choices, _THREADS)
    return out


if __name__ == "__main__":
    main(*sys.argv[1:])

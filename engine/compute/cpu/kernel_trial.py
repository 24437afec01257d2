"""Call every function of a compiled kernel library once, in a process that may crash.

Started by `engine.compute.cpu.kernel_file`. Imports no torch, so that it is quick: the numbers are arrays of ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from typing import Any

from engine.compute.cpu.kernel_calls import Calls, Layer, Matrix, Part
from engine.scheduling.block_pool import BLOCK_SIZE

__all__ = ["main"]

_DEPTH, _COLUMNS, _ROWS, _THREADS = 130, 40, 7, 2
_HEAD = 16


def main(library: str) -> None:
    """Load a compiled file and try it. Exits with 1 if a result is wrong."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may crash, and a core dump would be of no use
    try:
        calls = Calls(ctypes.CDLL(library))
    except (OSError, AttributeError) as error:
        sys.exit(str(error))
    calls.target()
    for kind in (0, 1, 2):
        _expect(f"a product of kind {kind}", _product(calls, kind), _DEPTH * 0.5, tolerance=1.0)
    _expect("attention", _attention(calls), 1.0)
    _expect("a norm", _norm(calls), 1.0)
    _expect("an activation", _silu(calls), 1 / (1 + math.exp(-1)))
    _layer(calls)


def _expect(what: str, found: Any, wanted: float, tolerance: float = 1e-3) -> None:
    wrong = next((number for number in found if not abs(number - wanted) <= tolerance), None)
    if wrong is not None:
        sys.exit(f"{what} is {wrong:g}, not {wanted:g}")


def _ones(count: int, value: float = 1.0) -> Any:
    return (ctypes.c_float * count)(*[value] * count)


def _packed(calls: Calls, columns: int, depth: int, kind: int, value: float = 0.5) -> Any:
    out = ctypes.create_string_buffer(int(calls.packed_bytes(columns, depth, kind)))
    calls.pack(_ones(columns * depth, value), out, columns, depth, kind, _THREADS)
    return out


def _matrices(*weights: tuple[Any, int]) -> Any:
    return (Matrix * len(weights))(*(Matrix(ctypes.addressof(data), None, columns) for data, columns in weights))


def _product(calls: Calls, kind: int) -> Any:
    weight = _packed(calls, _COLUMNS, _DEPTH, kind)
    scratch = ctypes.create_string_buffer(_ROWS * int(calls.scratch(_DEPTH, kind)))
    out = _ones(_ROWS * _COLUMNS, 0.0)
    table = _matrices((weight, _COLUMNS))
    calls.linear(_ones(_ROWS * _DEPTH), scratch, out, table, _ROWS, _DEPTH, 1, kind, _THREADS)
    return out


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


def _norm(calls: Calls) -> Any:
    out = _ones(512 * _DEPTH, 0.0)
    calls.rms_norm(_ones(512 * _DEPTH), _ones(_DEPTH), out, 512, _DEPTH, 1e-6, _THREADS)
    return out


def _silu(calls: Calls) -> Any:
    out = _ones(10_000, 0.0)
    calls.silu(_ones(10_000), out, 10_000, _THREADS)
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
        first_norm=ctypes.addressof(norm),
        second_norm=ctypes.addressof(norm),
        dim=dim,
        inner=inner,
        heads=heads,
        kv_heads=1,
        key_dim=_HEAD,
        value_dim=_HEAD,
        rotary=_HEAD,
        first_epsilon=1e-6,
        second_epsilon=1e-6,
        scale=0.25,
    )
    slots, finite, _table, parts = _step(rows)
    scratch = ctypes.create_string_buffer(rows * int(calls.layer_scratch(ctypes.byref(record))))
    out, keys, values = _ones(rows * dim, 0.0), _ones(BLOCK_SIZE * _HEAD, 0.0), _ones(BLOCK_SIZE * _HEAD, 0.0)
    angles = _ones(rows * _HEAD)
    calls.layer(
        ctypes.byref(record), _ones(rows * dim), angles, angles, out, scratch, keys, values, slots, finite, parts,
        rows, rows, BLOCK_SIZE, 1, _THREADS,
    )  # fmt: skip
    if not all(math.isfinite(number) for number in out):
        sys.exit("a layer's numbers are not finite")


if __name__ == "__main__":
    main(*sys.argv[1:])

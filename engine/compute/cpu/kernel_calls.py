"""Declare the functions of kernels.c for ctypes: structures and signatures. Knows no torch."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["Calls", "Layer", "Matrix", "Part"]

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class Matrix(ctypes.Structure):
    """One matrix of a product."""

    _fields_ = (("weight", POINTER), ("bias", POINTER), ("columns", LONG))


class Layer(ctypes.Structure):
    """A decoder layer."""

    _fields_ = (
        *((name, POINTER) for name in ("first_norm", "second_norm", "query_norm", "key_norm")),
        *((name, POINTER) for name in ("qkv", "o", "gate_up", "down", "sinks")),
        *((name, LONG) for name in ("dim", "inner", "heads", "kv_heads", "key_dim", "value_dim")),
        *((name, LONG) for name in ("rotary", "window", "chunk")),
        *((name, INT) for name in ("qkv_kind", "o_kind", "gate_up_kind", "down_kind")),
        *((name, FLOAT) for name in ("first_epsilon", "second_epsilon", "query_epsilon", "key_epsilon")),
        *((name, FLOAT) for name in ("scale", "softcap")),
    )


class Part(ctypes.Structure):
    """One sequence's rows in a step of attention (a `PackedChunk`)."""

    _fields_ = (("row", LONG), ("count", LONG), ("start", LONG), ("table", POINTER), ("first_item", LONG))


class Calls:
    """The functions of a compiled library, each with its signature. kernels.c says what they compute."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Look the functions up. Raises AttributeError: the library lacks one."""
        self.linear = _typed(library.verbatim_linear, [POINTER] * 4 + [LONG] * 3 + [INT] * 2)
        self.pack = _typed(library.verbatim_pack, [POINTER, POINTER, LONG, LONG, INT, INT], INT)
        self.packed_bytes = _typed(library.verbatim_packed_bytes, [LONG, LONG, INT], LONG)
        self.scratch = _typed(library.verbatim_scratch, [LONG, INT], LONG)
        self.attention = _typed(
            library.verbatim_attention,
            [POINTER] * 3 + [LONG] * 6 + [POINTER] * 7 + [LONG] * 9 + [FLOAT] * 2 + [INT],
        )
        self.rms_norm = _typed(library.verbatim_rms_norm, [POINTER] * 3 + [LONG] * 2 + [FLOAT, INT])
        self.silu = _typed(library.verbatim_silu, [POINTER, POINTER, LONG, INT])
        self.layer_scratch = _typed(library.verbatim_layer_scratch, [POINTER], LONG)
        self.layer = _typed(library.verbatim_layer, [POINTER] * 11 + [LONG] * 4 + [INT])
        self.lanes = _typed(library.verbatim_lanes, [], INT)
        self.target = _typed(library.verbatim_target, [], ctypes.c_char_p)


def _typed(function: Any, arguments: list[Any], result: Any = None) -> Any:
    function.argtypes, function.restype = arguments, result
    return function

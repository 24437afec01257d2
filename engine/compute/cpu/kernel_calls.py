"""Declare the functions of kernels.c for ctypes: structures and signatures. Knows no torch."""

from __future__ import annotations

import ctypes
from typing import Any, Final

__all__ = ["ACTIVATIONS", "PAIRINGS", "Calls", "Experts", "Format", "GroupParts", "Layer", "Matrix", "Norm", "Part"]

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float

ACTIVATIONS: Final = {"silu": 0, "gelu_tanh": 1, "clamped": 2}
"""Activations that there are kernels for; the numbers of rows.h."""

PAIRINGS: Final = {"halves": 0, "neighbours": 1, "neighbours_half": 2, "halves_half": 3}
"""Which numbers of a head are rotated together; the numbers of rows.h, which says how."""


class Format(ctypes.Structure):
    """How whole numbers in groups are stored; all that is not in a packed weight's bytes."""

    _fields_ = tuple(
        (name, INT)
        for name in ("bits", "group", "per", "zero", "scales", "supers", "minima", "minimum_supers", "zeros")
    )


class GroupParts(ctypes.Structure):
    """The parts of a weight in groups, as they come."""

    _fields_ = tuple((name, POINTER) for name in ("numbers", "scales", "supers", "minima", "minimum_supers", "zeros"))


class Matrix(ctypes.Structure):
    """One matrix of a product."""

    _fields_ = (("weight", POINTER), ("bias", POINTER), ("columns", LONG), ("format", POINTER), ("kind", INT))


class Norm(ctypes.Structure):
    """A norm; without a weight there is none."""

    _fields_ = (("weight", POINTER), ("epsilon", FLOAT), ("centred", INT))


class Layer(ctypes.Structure):
    """A decoder layer."""

    _fields_ = (
        *((name, Norm) for name in ("input_norm", "attention_norm", "mlp_norm", "output_norm")),
        *((name, Norm) for name in ("query_norm", "key_norm")),
        *((name, POINTER) for name in ("qkv", "o", "gate_up", "down", "sinks")),
        *((name, LONG) for name in ("dim", "inner", "heads", "kv_heads", "key_dim", "value_dim")),
        *((name, LONG) for name in ("rotary", "window", "chunk")),
        *((name, INT) for name in ("qkv_count", "gate_up_count")),
        *((name, INT) for name in ("pairing", "activation", "whole", "parallel")),
        *((name, FLOAT) for name in ("scale", "softcap", "factor")),
    )


class Experts(ctypes.Structure):
    """The experts of a layer."""

    _fields_ = (
        *((name, POINTER) for name in ("gate_up", "down")),
        *((name, LONG) for name in ("dim", "inner", "experts", "row_bytes")),
        ("activation", INT),
    )


class Part(ctypes.Structure):
    """One sequence's rows in a step of attention (a `PackedChunk`)."""

    _fields_ = (("row", LONG), ("count", LONG), ("start", LONG), ("table", POINTER), ("first_item", LONG))


class Calls:
    """The functions of a compiled library, each with its signature. kernels.c says what they compute."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Look the functions up. Raises AttributeError: the library lacks one."""
        self.linear = _typed(library.verbatim_linear, [POINTER] * 4 + [LONG] * 3 + [INT])
        self.pack = _typed(library.verbatim_pack, [POINTER, POINTER, LONG, LONG, INT, INT], INT)
        self.pack_groups = _typed(library.verbatim_pack_groups, [POINTER] * 3 + [LONG] * 2 + [INT], INT)
        self.round = _typed(library.verbatim_round, [POINTER] * 6 + [LONG] * 2 + [INT] * 2, INT)
        self.packed_bytes = _typed(library.verbatim_packed_bytes, [LONG, LONG, INT, POINTER], LONG)
        self.widen = _typed(library.verbatim_widen, [POINTER] * 3 + [LONG] * 2 + [INT])
        self.scratch = _typed(library.verbatim_scratch, [LONG, INT], LONG)
        self.attention = _typed(
            library.verbatim_attention,
            [POINTER] * 3 + [LONG] * 6 + [POINTER] * 7 + [LONG] * 9 + [FLOAT] * 2 + [INT],
        )
        self.norm = _typed(library.verbatim_norm, [POINTER] * 3 + [LONG] * 2 + [FLOAT, INT, INT])
        self.activate = _typed(library.verbatim_activate, [POINTER, POINTER, LONG, INT, INT])
        self.layer_scratch = _typed(library.verbatim_layer_scratch, [POINTER], LONG)
        self.layers = _typed(library.verbatim_layers, [POINTER, LONG] + [POINTER] * 11 + [LONG] * 4 + [INT])
        self.experts_scratch = _typed(library.verbatim_experts_scratch, [POINTER, LONG, LONG], LONG)
        self.experts = _typed(library.verbatim_experts, [POINTER] * 6 + [LONG] * 2 + [INT])
        self.matrix_unit = _typed(library.verbatim_matrix_unit, [INT], INT)
        self.lanes = _typed(library.verbatim_lanes, [], INT)
        self.target = _typed(library.verbatim_target, [], ctypes.c_char_p)


def _typed(function: Any, arguments: list[Any], result: Any = None) -> Any:
    function.argtypes, function.restype = arguments, result
    return function

"""Read the header of a safetensors file before its tensors are read. Knows bytes and JSON; no torch.

Format: 8 bytes length, JSON of that length, the tensors' bytes (https://github.com/huggingface/safetensors). What the
header says must fit the file: nothing is allocated, multiplied or skipped to by numbers that were not checked.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final, NamedTuple

from engine.errors import LoadError
from engine.text import bounded_json

__all__ = ["TensorEntry", "read_header"]

_BITS: Final = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64},
    **{"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8},
}
"""Bits of one value, for the types whose size is whole bytes."""
LONGEST_HEADER: Final = 100_000_000  # safetensors' own limit
_MOST_AXES: Final = 64  # torch's own limit


class TensorEntry(NamedTuple):
    """What a header says of one tensor. `size`: in bytes; `start`: where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path, name: str) -> dict[str, TensorEntry]:
    """Return the tensors of a file, by name.

    Raises:
        LoadError: there is no header, or it says something impossible.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("the header is longer than the file")
            if length > LONGEST_HEADER:
                raise ValueError(f"the header has {length} bytes, more than {LONGEST_HEADER} are not read")
            table = bounded_json.parse(handle.read(length))
        if not isinstance(table, dict):
            raise ValueError("the header is not a JSON object")
        table.pop("__metadata__", None)
        ends = [_end(entry, tensor) for tensor, entry in table.items()]
        end = max(ends, default=0)
        if 8 + length + end > size:
            raise LoadError(f"{name}: {file.name} is cut short: {size} bytes of {8 + length + end}. Copy it again.")
        found = {tensor: _tensor(entry, tensor, 8 + length) for tensor, entry in table.items()}
        _check_order(found, 8 + length)
        return found
    except (OSError, ValueError) as error:
        raise LoadError(f"{name}: {file.name} is not a readable safetensors file ({error}).") from None


def _end(entry: Any, tensor: str) -> int:
    """Check a tensor's entry, and return where its bytes end."""
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {tensor[:100]!r} is not an object")
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise ValueError(f"{tensor[:100]!r} has no dtype")
    if not _are_counts(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"{tensor[:100]!r} has no shape of at most {_MOST_AXES} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{tensor[:100]!r} has no data_offsets of two whole numbers in order")
    return int(offsets[1])


def _check_order(entries: dict[str, TensorEntry], at: int) -> None:
    """Refuse tensors that overlap, or leave bytes out, as safetensors does: a small file could claim any memory."""
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != at:
            raise ValueError(f"{tensor[:100]!r} does not begin where the tensor before it ends")
        at += entry.size


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)


def _tensor(entry: dict[str, Any], tensor: str, data: int) -> TensorEntry:
    begin, end = entry["data_offsets"]
    found = TensorEntry(entry["dtype"], tuple(entry["shape"]), end - begin, data + begin)
    bits = _BITS.get(found.dtype)
    if bits is not None and found.numel * bits != found.size * 8:
        raise ValueError(
            f"{tensor[:100]!r} of shape {list(found.shape)} and type {found.dtype} has {found.size} bytes, not "
            f"{found.numel * bits // 8}"
        )
    return found

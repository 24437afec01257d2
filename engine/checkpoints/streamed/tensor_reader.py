"""Read tensors of safetensors files piece by piece, and let transformers read by it. Knows bytes and dtypes; no model.

transformers maps the files into memory, and every page that was read stays a part of the process: at the end as much as
the whole checkpoint. Here each tensor is read into memory of its own when it is asked for. One that is packed while it
is read is handed on unread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.safetensors_file import TensorEntry, read_header

__all__ = ["DTYPES", "StoredTensor", "reading"]

DTYPES: Final = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool},
}
"""The types of tensors that are read, by safetensors' names."""


class StoredTensor:
    """A tensor in a file, with what transformers asks of safetensors' slices.

    Attributes:
        name: in the file; dtype, shape: of the tensor.
    """

    def __init__(self, handle: int, name: str, entry: TensorEntry, stays: Callable[[str], bool]) -> None:
        self.name, self.dtype, self.shape = name, DTYPES[entry.dtype], torch.Size(entry.shape)
        self._handle, self._entry, self._stays = handle, entry, stays

    def get_dtype(self) -> str:
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> Any:
        """Read all or a part; return the tensor unread if it is asked for as a whole and packed while it is read."""
        if index is Ellipsis:
            return self if self._stays(self.name) else self.read()
        return self.read()[index]

    def to(self, *_: Any, **__: Any) -> StoredTensor:
        """Return itself: an unread tensor is moved or cast by whoever reads it."""
        return self

    def read(self) -> Tensor:
        return self._bytes(0, self._entry.size).view(self.dtype).view(self.shape)

    def rows(self, start: int, end: int) -> Tensor:
        """Read `[end - start, …]`, along the first dimension."""
        row = self._entry.size // max(self.shape[0], 1)
        return self._bytes(start * row, (end - start) * row).view(self.dtype).view(end - start, *self.shape[1:])

    def _bytes(self, start: int, size: int) -> Tensor:
        out = torch.empty(size, dtype=torch.uint8)
        view, done = memoryview(out.numpy()), 0  # type: ignore[arg-type]
        while done < size:
            got = os.preadv(self._handle, [view[done:]], self._entry.start + start + done)
            if not got:
                raise OSError(f"the file ends within {self.name}")
            done += got
        return out


class _OpenFile:
    """Stands in for `safetensors.safe_open`."""

    def __init__(self, path: str, entries: Mapping[str, TensorEntry], stays: Callable[[str], bool]) -> None:
        self._entries, self._stays = entries, stays
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    __del__ = __exit__

    def keys(self) -> list[str]:
        return list(self._entries)

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def get_slice(self, name: str) -> StoredTensor:
        return StoredTensor(self._handle, name, self._entries[name], self._stays)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name).read()


def can_read(found: Checkpoint, name: str) -> bool:
    """Tell whether all tensors of a folder are of types that are read here. name: the model's id, for messages."""
    return all(entry.dtype in DTYPES for file in found.files for entry in read_header(file, name).values())


@contextmanager
def reading(found: Checkpoint, name: str, stays: Callable[[str], bool]) -> Iterator[None]:
    """Give transformers this way to read the checkpoint's files inside the `with` block.

    Args:
        name: the model's id, for messages.
        stays: whether the tensor of a name is handed on unread.
    """
    from transformers import modeling_utils

    entries = {str(file): read_header(file, name) for file in found.files}
    original: Any = modeling_utils.safe_open

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        known = entries.get(str(path)) or entries.get(str(Path(path).resolve()))
        return original(path, *args, **kwargs) if known is None else _OpenFile(str(path), known, stays)

    modeling_utils.safe_open = opened
    try:
        yield
    finally:
        modeling_utils.safe_open = original

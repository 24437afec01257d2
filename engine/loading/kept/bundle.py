"""One file of tensors, each with a checksum: written whole or not at all, mapped into memory, checked beside the load.

    head, one page │ tensors, each from a page's start │ index (JSON) │ the index's length, its SHA-256, a mark

A tensor is given out only when its bytes have been read and their SHA-256 is that of the index. Only this user and root
may be able to write the file, so a checksum has to find damage, not malice. Knows no model and no kernel.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator, KeysView, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.cache_folder import written_by_others

__all__ = ["Bundle", "Distrusted", "Record", "TooLarge", "Unreadable", "size_of", "sweep", "write"]

Record = Mapping[str, Tensor | str | int | float | bool | None]
"""Named tensors and plain values that belong together: a packed weight, say."""

_HEAD: Final = b"verbatim packed weights 1\n"
_MARK: Final = b"verbatim index\n"
_PAGE: Final = 4096
_FOOT: Final = 16 + 64 + len(_MARK)  # bytes: the index's length in hexadecimal, its SHA-256, the mark
_LARGEST_INDEX: Final = 64 << 20
_POPULATE_READ: Final = 22  # MADV_POPULATE_READ of Linux 5.14, which Python 3.11 does not name
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16)
}
_PARTIAL: Final = ".partial-"
_CANNOT_RESERVE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class Distrusted(Exception):
    """The file is not whole, or somebody else may have written it; the message goes on from "it"."""


class Unreadable(Distrusted):
    """The file may be well, but cannot be read here and now."""


class TooLarge(Exception):
    """There is not enough room on the disk."""


class Bundle:
    """An open file. Its tensors are mapped: they take no memory of their own, and processes share it."""

    def __init__(self, memory: mmap.mmap, index: dict[str, dict[str, Any]], threads: int) -> None:
        self._memory, self._index = memory, index
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="checksums")
        self._checks: dict[int, Future[bool]] = {}
        for place in sorted(_tensors(index), key=lambda place: int(place["offset"])):
            self._checks[place["offset"]] = self._pool.submit(self._is_whole, place)

    @classmethod
    def open(cls, path: Path, key: str) -> Bundle:
        """Map a file, and begin to check its tensors on threads of its own.

        Args:
            key: what it was written with.

        Raises:
            Distrusted: it is not ours, or not whole, as far as its index tells.
            FileNotFoundError: there is none.
        """
        memory = _map(path)
        try:
            index = _read_index(memory, key)
            return cls(memory, index, threads=min(4, os.cpu_count() or 1))
        except BaseException:
            memory.close()
            raise

    @property
    def names(self) -> KeysView[str]:
        """The names of the records, in the order in which they were written."""
        return self._index.keys()

    def take(self, name: str) -> dict[str, Any]:
        """Return a record once its tensors are checked. Raises KeyError, or Distrusted: a tensor is damaged."""
        return {
            field: self._tensor(value) if _is_tensor(value) else value for field, value in self._index[name].items()
        }

    def close(self) -> None:
        """Check nothing more. Tensors that were taken stay."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _tensor(self, place: dict[str, Any]) -> Tensor:
        if not self._checks[place["offset"]].result():
            raise Distrusted("is not whole: the checksum of a weight is another")
        shape, dtype = place["shape"], _DTYPES[place["dtype"]]
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=prod(shape), offset=place["offset"]).view(shape)

    def _is_whole(self, place: dict[str, Any]) -> bool:
        start, size = place["offset"], place["bytes"]
        if size:
            with contextlib.suppress(OSError, ValueError):  # one call in place of a fault for every page
                self._memory.madvise(_POPULATE_READ, start, size)
        with memoryview(self._memory) as whole, whole[start : start + size] as part:
            return hashlib.sha256(part).hexdigest() == str(place["sha256"])


def size_of(records: Mapping[str, Record]) -> int:
    """Count the bytes of a file with these records, its index aside."""
    tensors = (value for record in records.values() for value in record.values() if isinstance(value, Tensor))
    return _PAGE + sum(_padded(tensor.numel() * tensor.itemsize) for tensor in tensors)


def write(path: Path, key: str, records: Mapping[str, Record]) -> None:
    """Write a file beside its place, flush it to the disk, then rename it: no reader ever sees a part of it.

    Raises:
        OSError: the disk is full or cannot be written; nothing is left. TooLarge: it would take more than half of what
            is free.
    """
    size = size_of(records)
    free = os.statvfs(path.parent)
    if size > free.f_bavail * free.f_frsize // 2:
        raise TooLarge(f"it would take more than half of what is free in {path.parent}")
    descriptor, name = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
    partial = Path(name)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            _lock(descriptor)
            os.chmod(descriptor, 0o600)
            _reserve(descriptor, size)
            _write_records(descriptor, key, records)
            os.fsync(file.fileno())
            partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what writers have left that were ended meanwhile; a writer at work holds a lock."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                _lock(descriptor)
                partial.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _write_records(descriptor: int, key: str, records: Mapping[str, Record]) -> None:
    _write_at(descriptor, 0, _HEAD)
    index, at = dict[str, dict[str, Any]](), _PAGE
    for name, record in records.items():
        index[name] = {}
        for field, value in record.items():
            if not isinstance(value, Tensor):
                index[name][field] = value
                continue
            flat: Any = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            content = memoryview(flat)
            _write_at(descriptor, at, content)
            index[name][field] = {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": list(value.shape),
                "offset": at,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            at += _padded(len(content))
    text = json.dumps({"key": key, "records": index}).encode()
    foot = f"{len(text):016x}{hashlib.sha256(text).hexdigest()}".encode() + _MARK
    _write_at(descriptor, at, text + foot)
    os.ftruncate(descriptor, at + len(text) + _FOOT)


def _write_at(descriptor: int, at: int, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view[: 1 << 26], at)
        view, at = view[written:], at + written


def _padded(size: int) -> int:
    """Round up to whole pages; nothing takes a page, too, so that every tensor has a place of its own."""
    return max(-(-size // _PAGE), 1) * _PAGE


def _reserve(descriptor: int, size: int) -> None:
    """Find out that the disk is full before anything is written, where the file system can tell."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise


def _lock(descriptor: int) -> None:
    """Take the lock of a partial file. Raises BlockingIOError: its writer is at work."""
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _map(path: Path) -> mmap.mmap:
    try:
        # A link is not followed, and a pipe not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Distrusted("is no file of ours")
            if fault := written_by_others(status):
                raise Distrusted(fault)
            if status.st_size < _PAGE + _FOOT:
                raise Distrusted("is not whole: it is too short")
            # A private copy: a stray write of this process would change neither the file nor another process.
            return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise Distrusted("is a link") from error
        raise Unreadable(f"cannot be read: {error.strerror}") from error


def _read_index(memory: mmap.mmap, key: str) -> dict[str, dict[str, Any]]:
    """Read the records' index. Raises Distrusted."""
    end = len(memory) - _FOOT
    foot = memory[end:]
    try:
        length = int(foot[:16], 16)
    except ValueError:
        length = -1
    if (
        foot[80:] != _MARK
        or not 0 <= length <= min(end - _PAGE, _LARGEST_INDEX)
        or not memory[:_PAGE].startswith(_HEAD)
    ):
        raise Distrusted("is not whole: its end is missing")
    text = memory[end - length : end]
    if hashlib.sha256(text).hexdigest().encode() != foot[16:80]:
        raise Distrusted("is not whole: its checksum is another")
    found = json.loads(text)
    if found["key"] != key:
        raise Distrusted("is another model's")
    index: dict[str, dict[str, Any]] = found["records"]
    for place in _tensors(index):
        itemsize = torch.empty(0, dtype=_DTYPES[place["dtype"]]).itemsize
        if place["offset"] + place["bytes"] > end - length or prod(place["shape"]) * itemsize != place["bytes"]:
            raise Distrusted("is not whole: a weight lies outside")
    return index


def _tensors(index: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (value for record in index.values() for value in record.values() if _is_tensor(value))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict)

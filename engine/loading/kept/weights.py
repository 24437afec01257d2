"""Keep a model's packed weights in the cache folder, so that its next start packs nothing.

A kept file is used only for the very same files of a checkpoint, quantisation, code, libraries and compiled kernels:
all of them are in its key. What is damaged or foreign is told, removed and made again; a disk that is full or read-only
costs the next start its shortcut and nothing else. All files together stay below a limit; what was used longest ago
leaves first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from engine.cache_folder import cache_folder, private_folder
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import Keep, PackedWeight
from engine.config import parse_size
from engine.errors import LoadError, one_line
from engine.loading.kept import bundle
from engine.loading.kept.bundle import Bundle, Distrusted, Record, TooLarge, Unreadable
from engine.types.fingerprint_parts import Parts, digest_of

__all__ = ["LIMIT_NAME", "KeptWeights", "kept_folder", "limit"]

LIMIT_NAME: Final = "VERBATIM_PACKED_CACHE"
"""The environment variable with the limit: a size, or `off`."""
_LIMIT: Final = 32 << 30
_LEAST: Final = 64 << 20  # bytes of weights below which packing is as quick as reading
_SUFFIX: Final = ".weights"
_DIGITS: Final = 40  # hexadecimal digits of a key

log = logging.getLogger("verbatim.engine")


class KeptWeights:
    """The packed weights of one model, kept or to be kept. Used on one thread."""

    def __init__(
        self,
        name: str,
        parts: Callable[[Kernels], Parts] | None,
        *,
        folder: Path | None = None,
        most: int | None = None,
        least: int = _LEAST,
    ) -> None:
        """Args:
        name: the model's, for messages.
        parts: returns everything that the weights depend on; None: nothing is kept.
        folder: where the files lie; None: `kept_folder`. most: bytes of all files; None: `limit`. least: of one.
        """
        self._name, self._parts, self._most, self._least = name, parts, most, least
        self._folder, self._key = folder, ""
        self._records: dict[str, Record] = {}
        self._open, self._made = False, False
        self._bundle: Bundle | None = None

    def of(self, kernels: Kernels) -> Keep:
        """Find what is kept for these kernels, and return `keep`.

        Raises:
            LoadError: `VERBATIM_PACKED_CACHE` is neither a size nor `off`.
        """
        if self._most is None:
            self._most = limit()
        if self._parts is None or not self._most or self._open:
            return self.keep
        self._folder, why = _private(self._folder or kept_folder())
        if self._folder is None:
            log.warning("%s: packed weights are not kept for the next start: %s", self._name, why)
            return self.keep
        self._open = True
        self._key = str(digest_of(dict(self._parts(kernels))))[-_DIGITS:]
        with contextlib.suppress(OSError):
            bundle.sweep(self._folder)
        try:
            self._bundle = Bundle.open(self._path, self._key)
        except FileNotFoundError:
            return self.keep
        except Distrusted as error:
            self._drop(error)
            return self.keep
        with contextlib.suppress(OSError):  # a read-only disk
            os.utime(self._path)  # so that it leaves last
        return self.keep

    def keep(self, name: str, make: Callable[[], PackedWeight]) -> PackedWeight:
        """Return the kept weight of this name, else the one that `make` returns, which `finish` then keeps."""
        found = self._take(name)
        if found is not None:
            with contextlib.suppress(TypeError):  # of another shape than today's, which no key should let happen
                weight = PackedWeight(**found)
                self._records[name] = found
                return weight
        weight = make()
        if not self._open:
            return weight
        self._made = True
        self._records[name] = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
        return weight

    def known(self, name: str) -> dict[str, Any] | None:
        """Return the record that `note` has added in an earlier start."""
        return self._take(name)

    def note(self, name: str, record: Record) -> None:
        """Add a record to the weights, unless it is there."""
        self._made = self._made or self._bundle is None or name not in self._bundle.names
        self._records[name] = record

    def forget(self) -> None:
        """Remove what was kept: it is not what it was taken for."""
        if self._bundle is not None:
            self._drop(Distrusted("does not give the bits of the start that kept it"))

    def finish(self) -> threading.Thread | None:
        """Keep what was made, on a thread beside; to be called once the model has passed its tests. Returns the thread.

        The interpreter waits for it before it ends: a command that answers once leaves a file for the next, too.
        """
        if self._bundle is not None:
            self._bundle.close()
        records, self._records = self._records, {}
        if not self._open or not self._made or not all(map(_is_plain, records.values())):
            return None
        if not self._least <= bundle.size_of(records) <= (self._most or 0):
            return None
        thread = threading.Thread(target=self._write, args=(records,), name="keep weights")
        thread.start()
        return thread

    def _take(self, name: str) -> dict[str, Any] | None:
        if self._bundle is None or name not in self._bundle.names:
            return None
        try:
            return self._bundle.take(name)
        except Distrusted as error:
            self._drop(error)
            return None

    def _drop(self, error: Distrusted) -> None:
        """Tell why the file is not used, and remove it if it is of no use to anybody."""
        log.warning("%s: the kept weights in %s are not used: the file %s", self._name, self._path, error)
        if self._bundle is not None:
            self._bundle.close()
        self._bundle = None
        if not isinstance(error, Unreadable):
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _write(self, records: dict[str, Record]) -> None:
        path, why = self._path, ""
        try:
            _make_room(path, (self._most or 0) - bundle.size_of(records))
            bundle.write(path, self._key, records)
        except OSError as error:
            why = f"{path.parent}: {error.strerror or error}"
        except TooLarge as error:
            why = str(error)
        except Exception as error:  # whatever it is, the model serves
            why = one_line(error)
        if why:
            log.warning("%s: its packed weights are not kept for the next start: %s", self._name, why)

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._key}{_SUFFIX}"


def kept_folder() -> Path | None:
    """Return the folder with the packed weights of all models; None where this user has no home."""
    base = cache_folder()
    return None if base is None else base / "packed"


def limit() -> int:
    """Return how many bytes may be kept: 0 for none.

    Raises:
        LoadError: `VERBATIM_PACKED_CACHE` is neither a size nor `off`.
    """
    text = os.environ.get(LIMIT_NAME, "").strip()
    if not text:
        return _LIMIT
    if text.lower() == "off":
        return 0
    try:
        return parse_size(text)
    except ValueError as error:
        raise LoadError(f"{LIMIT_NAME}: {error}, or off.") from None


def _private(folder: Path | None) -> tuple[Path | None, str]:
    return (None, "there is no home to keep them in") if folder is None else private_folder(folder)


def _make_room(new: Path, most: int) -> None:
    """Remove the files that were used longest ago until those beside `new` have at most `most` bytes."""
    found = []
    for path in new.parent.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # another process has just removed it
            status = path.lstat()
            if path != new:
                found.append((status.st_mtime_ns, status.st_size, path))
    used = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if used <= most:
            return
        log.info("%s leaves the kept weights, to make room", path)
        path.unlink(missing_ok=True)  # a process that has mapped it goes on with it
        used -= size


def _is_plain(record: Record) -> bool:
    """Tell whether a file can hold a record: tensors and plain values."""
    return all(value is None or isinstance(value, Tensor | str | int | float | bool) for value in record.values())

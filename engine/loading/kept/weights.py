"""Keep a model's packed weights in the cache folder, so that its next start packs nothing.

A kept file is used only for the very same files of a checkpoint, quantisation, code, libraries and compiled kernels:
all of them are in its key. What is damaged or foreign is told, removed and made again; a disk that is full or read-only
costs the next start its shortcut and nothing else. All files together stay below a limit; what was used longest ago
leaves first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from engine.cache_folder import cache_folder, private_folder
from engine.compute.cpu.kernel_calls import Format
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
_SAME: Final = "same as"
_NOTE: Final = " "  # before the name of what is no weight: no layer's name begins so
_NOTES: Final = 8
"""Notes that one file holds: starts with other settings of the same weights leave one each."""
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
        self._given: dict[str, PackedWeight] = {}
        self._found: Callable[[], Parts] | None = None
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
        parts = self._parts
        self._folder, why = _private(self._folder or kept_folder())
        if self._folder is None:
            log.warning("%s: packed weights are not kept for the next start: %s", self._name, why)
            return self.keep
        self._open, self._found = True, lambda: parts(kernels)
        with contextlib.suppress(OSError):
            bundle.sweep(self._folder)
        if not any(self._folder.glob(f"*{_SUFFIX}")):  # then nobody waits for the key, of which files are hashed
            return self.keep
        try:
            self._bundle = Bundle.open(self._path, self._key)
        except FileNotFoundError:
            return self.keep
        except Distrusted as error:
            self._drop(error)
            return self.keep
        log.info("%s: packed weights of an earlier start: %s", self._name, self._path)
        with contextlib.suppress(OSError):  # a read-only disk
            os.utime(self._path)  # so that it leaves last
        return self.keep

    def keep(self, name: str, make: Callable[[], PackedWeight]) -> PackedWeight:
        """Return the kept weight of this name, else the one that `make` returns, which `finish` then keeps."""
        if not self._open:
            return make()
        found = self._take(name)
        weight = None if found is None else self._weight(found)
        if found is None or weight is None:
            weight = make()
            self._made = True
            same = next((other for other, given in self._given.items() if given is weight), None)
            found = dict(record_of(weight)) if same is None else {_SAME: same}
        record: Record = found
        self._records[name], self._given[name] = record, weight
        return weight

    def _weight(self, record: Mapping[str, Any]) -> PackedWeight | None:
        """Make a weight of its record; None if it is that of another name, which was not kept."""
        return self._given.get(record[_SAME]) if _SAME in record else weight_of(record)

    def known(self, name: str) -> dict[str, Any] | None:
        """Return the record that `note` has added in an earlier start."""
        return self._take(_NOTE + name)

    def note(self, name: str, record: Record) -> None:
        """Add a record to the weights, unless it is there. Those of other starts stay, up to `_NOTES` in all."""
        name = _NOTE + name
        self._made = self._made or self._bundle is None or name not in self._bundle.names
        self._records[name] = record

    def _with_other_notes(self) -> dict[str, Record]:
        """Return weights, the newest notes of earlier starts that this one has not made, and its own, as they fit."""
        others = [name for name in (self._bundle.names if self._bundle else ()) if name.startswith(_NOTE)]
        newest = [name for name in others if name not in self._records][1 - _NOTES :]
        found = {name: record for name in newest if (record := self._take(name)) is not None}
        own = {name: record for name, record in self._records.items() if name.startswith(_NOTE)}
        weights = {name: record for name, record in self._records.items() if name not in own}
        while found and bundle.size_of({**weights, **found, **own}) > (self._most or 0):
            del found[next(iter(found))]
        return {**weights, **found, **own}

    def forget(self) -> None:
        """Remove what was kept: it is not what it was taken for."""
        if self._bundle is not None:
            self._drop(Distrusted("does not give the bits of the start that kept it"))

    def finish(self) -> threading.Thread | None:
        """Keep what was made, on a thread beside; to be called once the model has passed its tests. Returns the thread.

        The interpreter waits for it before it ends: a command that answers once leaves a file for the next, too.
        """
        records, self._records = (self._with_other_notes() if self._made else self._records), {}
        if self._bundle is not None:
            self._bundle.close()
        self._given.clear()
        if not self._open or not self._made or not all(map(_is_plain, records.values())):
            return None
        if not self._least <= bundle.size_of(records) <= (self._most or 0):
            return None
        path = self._path
        thread = threading.Thread(target=self._write, args=(records, path), name="keep weights")
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

    def _write(self, records: dict[str, Record], path: Path) -> None:
        why = ""
        try:
            _make_room(path, (self._most or 0) - bundle.size_of(records))
            bundle.write(path, self._key, records)
            log.info("%s: packed weights are kept for the next start: %s", self._name, path)
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
        assert self._found is not None
        self._key = self._key or str(digest_of(dict(self._found())))[-_DIGITS:]
        return self._folder / f"{self._key}{_SUFFIX}"


def record_of(weight: PackedWeight) -> Record:
    """Return a weight as tensors and plain values."""
    layout = None
    if weight.format is not None:
        layout = " ".join(str(getattr(weight.format, name)) for name, *_ in Format._fields_)
    of = {"data": weight.data, "bias": weight.bias, "columns": weight.columns, "depth": weight.depth}
    return {**of, "kind": weight.kind, "format": layout}


def weight_of(record: Mapping[str, Any]) -> PackedWeight:
    """Make a weight of what `record_of` has returned."""
    layout = record["format"] and Format(*map(int, record["format"].split()))
    return PackedWeight(**{**record, "format": layout})


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

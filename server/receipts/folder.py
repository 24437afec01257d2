"""`FolderKeeper`: keeps receipts in a folder, `OWNER/ID.json`, each as `verbatim verify` takes it.

A receipt is written to a file of another name, flushed, and renamed: under its own name it is always whole. The file's
time is the receipt's `created`, so that a list and a sweep need not read it. Folders have mode 0700 and files 0600.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from engine import ConfigError
from server.errors import KeepingFault
from server.receipts.keeping import Kept, Written, is_receipt_id

__all__ = ["FolderKeeper", "receipt_in"]

_SUFFIX: Final = ".json"
_UNFINISHED: Final = ".part"
_ABANDONED: Final = 3600.0  # seconds after which an unfinished file is one that a crash has left


class FolderKeeper:
    """Keeps receipts in a folder of the file system.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = folder / f".{secrets.token_hex(8)}{_UNFINISHED}"
            probe.touch(0o600)
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"receipts cannot be kept in {folder}: {error.strerror or error}.") from None

    def put(self, owner: str, written: Written) -> None:
        folder = self._of(owner)
        unfinished = folder / f".{written.id}-{secrets.token_hex(4)}{_UNFINISHED}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                _write(unfinished, written)
                unfinished.rename(folder / f"{written.id}{_SUFFIX}")
            except BaseException:
                with contextlib.suppress(OSError):
                    unfinished.unlink()
                raise
            _flush(folder)
        except OSError as error:
            raise KeepingFault(f"a receipt could not be written to {folder}: {error.strerror or error}.") from error

    def get(self, owner: str | None, id: str) -> bytes | None:
        if not is_receipt_id(id):
            return None
        try:
            owners = [owner] if owner is not None else [name for name, _ in self._owners()]
            for name in owners:
                with contextlib.suppress(FileNotFoundError):
                    return _read(self._of(name) / f"{id}{_SUFFIX}")
        except OSError as error:
            raise KeepingFault(f"receipts in {self._folder} cannot be read: {error.strerror or error}.") from error
        return None

    def list(self, owner: str | None, after: str | None, most: int) -> list[Kept]:
        try:
            owners = [(owner, self._of(owner))] if owner is not None else list(self._owners())
            found = sorted((place for name, folder in owners for place in _receipts(name, folder)), reverse=True)
            if after is not None:
                start = next((i + 1 for i, (_, id, _) in enumerate(found) if id == after), len(found))
                found = found[start:]
            return [Kept(id, name, self._model(name, id), created) for created, id, name in found[:most]]
        except OSError as error:
            raise KeepingFault(f"receipts in {self._folder} cannot be read: {error.strerror or error}.") from error

    def sweep(self, before: float) -> int:
        dropped = 0
        abandoned = time.time() - _ABANDONED  # noqa: TID251  file times are the wall clock's
        try:
            for _, folder in self._owners():
                for entry in list(os.scandir(folder)):
                    with contextlib.suppress(FileNotFoundError):  # another server sweeps, too
                        at = entry.stat(follow_symlinks=False).st_mtime
                        if entry.name.endswith(_SUFFIX) and at < before:
                            os.unlink(entry.path)
                            dropped += 1
                        elif entry.name.endswith(_UNFINISHED) and at < abandoned:
                            os.unlink(entry.path)
        except OSError as error:
            raise KeepingFault(f"old receipts in {self._folder} stay: {error.strerror or error}.") from error
        return dropped

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _of(self, owner: str) -> Path:
        if not is_receipt_id(owner):
            raise KeepingFault(f"{owner!r} cannot be the name of a folder.")
        folder = self._folder / owner
        if folder.is_symlink():
            raise KeepingFault(f"{folder} is a link; receipts are kept in real folders only.")
        return folder

    def _owners(self) -> Iterator[tuple[str, Path]]:
        for entry in os.scandir(self._folder):
            if entry.is_dir(follow_symlinks=False) and is_receipt_id(entry.name):
                yield entry.name, Path(entry.path)

    def _model(self, owner: str, id: str) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return str(receipt_in(json.loads(_read(self._of(owner) / f"{id}{_SUFFIX}")))["model"]["name"])
        return ""


def receipt_in(document: dict[str, Any]) -> dict[str, Any]:
    """Return the receipt of a document that this server wrote: the document itself, or what its envelope holds."""
    if "payload" not in document:
        return document
    receipt: dict[str, Any] = json.loads(base64.b64decode(document["payload"]))["predicate"]
    return receipt


def _receipts(owner: str, folder: Path) -> Iterator[tuple[int, str, str]]:
    """Yield created, id and owner of each receipt in a folder."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            id = entry.name.removesuffix(_SUFFIX)
            if entry.name.endswith(_SUFFIX) and is_receipt_id(id):
                with contextlib.suppress(FileNotFoundError):  # swept meanwhile
                    yield int(entry.stat(follow_symlinks=False).st_mtime), id, owner


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would be waited for
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise FileNotFoundError
        return file.read()


def _write(path: Path, written: Written) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(written.body)
        file.flush()
        os.utime(handle, (written.created, written.created))
        os.fsync(handle)


def _flush(folder: Path) -> None:
    """Make a rename in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

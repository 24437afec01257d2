"""The file that a batch is written to: one run at a time, whole lines in the input's order, resumed where it ends.

Whatever stops a run (a signal, a full disk, the machine), what is there is a prefix of the output, and perhaps a torn
line behind it, which the next run cuts off. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from engine import ConfigError

__all__ = ["OutputFile", "WrittenLine"]


@dataclass(frozen=True, slots=True)
class WrittenLine:
    """What identifies a line of the output, and whether it is an answer with status 200."""

    id: str
    custom_id: str | None
    good: bool


class OutputFile:
    """The open output, locked for this process. Leaving its `with` block closes it and lets go of the lock.

    Raises:
        ConfigError: it cannot be opened, is no regular file, or another run writes to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}.") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise ConfigError(f"{path} is no regular file; a batch that stopped could not go on in it.")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{path} is being written by another run.") from None
        except BaseException:
            os.close(self._file)
            raise
        self._end = 0
        """Bytes of whole lines."""

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def same_as(self, other: int) -> bool:
        """Return whether a descriptor is of this very file."""
        return os.path.sameopenfile(self._file, other)

    def clear(self) -> None:
        """Drop everything that is there."""
        os.ftruncate(self._file, 0)

    def resume(self, check: Callable[[int, WrittenLine], None]) -> int:
        """Let `check` look at every whole line and its number, cut off what is behind the last one; return the number.

        Raises:
            ConfigError: a line was not written by a batch, or what `check` raises. Nothing is cut off then.
        """
        number = 0
        with open(self._file, "rb", closefd=False) as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                number += 1
                check(number, _read(raw, f"line {number} of {self._path}"))
                self._end += len(raw)
        if os.fstat(self._file).st_size != self._end:
            os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)
        return number

    def append(self, line: bytes) -> None:
        """Write a line. What a failure leaves of it is cut off.

        Raises:
            OSError: the disk is full, or a limit is reached.
        """
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def sync(self) -> None:
        """Wait until everything has reached the disk."""
        os.fsync(self._file)


def _read(raw: bytes, where: str) -> WrittenLine:
    try:
        data = json.loads(raw)
        response = data["response"]
        good = response is not None and response["status_code"] == 200
        return WrittenLine(data["id"], data["custom_id"], good)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError(
            f"{where} is not a batch's output; name another file, or write over this one with --overwrite."
        ) from None

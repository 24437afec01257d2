"""The file of a batch's requests, read line by line: of any length, with bounded memory but for the ids.

A line that is too long is skipped without being held; a `custom_id` that was there before makes a refusal. Of every id
16 bytes are remembered.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from engine import ConfigError
from server.batch.lines import BatchLine, Refusal, read_line, too_long, twice

__all__ = ["InputFile"]

_CHUNK = 1 << 16


class InputFile:
    """The open input.

    Args:
        limit: bytes of the longest line that is read.

    Attributes:
        size: bytes of the file; None if it is a pipe.
        position: bytes up to the end of the last line that was read.

    Raises:
        ConfigError: it cannot be opened.
    """

    def __init__(self, path: Path, limit: int) -> None:
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
        status = os.fstat(self._file.fileno())
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        self.position = 0
        self._limit = limit
        self._ids: set[bytes] = set()

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def __iter__(self) -> Iterator[BatchLine | Refusal]:
        """Read the next lines, blank ones left out."""
        while raw := self._file.readline(self._limit + 1):
            self.position += len(raw)
            if len(raw) > self._limit and not raw.endswith(b"\n"):
                yield too_long(self._limit, self._skip(raw))
            elif not raw.isspace():
                yield self._first(read_line(raw))

    def _skip(self, raw: bytes) -> str:
        """Read to the end of a line that is too long, and return its digest."""
        digest = hashlib.sha256(raw)
        while not raw.endswith(b"\n") and (raw := self._file.readline(_CHUNK)):
            self.position += len(raw)
            digest.update(raw)
        return digest.hexdigest()

    def _first(self, line: BatchLine | Refusal) -> BatchLine | Refusal:
        """Return the line, or a refusal if its id was there before."""
        if isinstance(line, Refusal):
            return line
        key = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
        if key in self._ids:
            return twice(line)
        self._ids.add(key)
        return line

"""The checksums of a bundle, in the format of `sha256sum -c`. Knows files; nothing of what they are for."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

__all__ = ["FILE", "digest_of", "faulty_name", "read_checksums", "tree", "write_checksums"]

FILE: Final = "checksums.sha256"

_LINE: Final = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_CHUNK: Final = 1 << 20


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raise(error: OSError) -> None:
    raise error


def tree(root: Path, unread: Callable[[OSError], None] = _raise) -> Iterator[tuple[str, bool]]:
    """Yield the name of everything below a folder that is not itself a folder, and whether it is a regular file.

    Names are relative, with slashes. Links are not followed: a link to a folder is yielded, too.
    `unread` is told of each folder that cannot be read: nothing below it is yielded.
    """
    for folder, folders, files in os.walk(root, onerror=unread, followlinks=False):
        for name in sorted([*files, *(name for name in folders if (Path(folder) / name).is_symlink())]):
            path = Path(folder) / name
            yield path.relative_to(root).as_posix(), stat.S_ISREG(path.lstat().st_mode)


def faulty_name(name: str) -> bool:
    """Tell whether a name leads out of the folder, is not in its simplest form, or would break a line."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or not _plain(name)


def _plain(name: str) -> bool:
    return "\\" not in name and name.isprintable()


def write_checksums(root: Path) -> None:
    """Write the checksums of all files below a folder into it.

    Raises:
        ValueError: something there is no regular file, or has a name that the format cannot hold.
    """
    lines = []
    for name, regular in tree(root):
        if not regular or faulty_name(name):
            raise ValueError(f"{name!r} cannot be part of a bundle")
        lines.append(f"{digest_of(root / name)}  {name}\n")
    (root / FILE).write_text("".join(sorted(lines, key=lambda line: line[66:])), encoding="utf-8")


def read_checksums(text: str) -> tuple[dict[str, str], list[str]]:
    """Read checksums by name, and what is wrong with the lines."""
    found: dict[str, str] = {}
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            faults.append(f"{FILE}: line {number} is not a checksum and a name.")
        elif faulty_name(match[2]):
            faults.append(f"{FILE}: line {number} names {match[2]!r}, which is no file of this folder.")
        elif match[2] in found:
            faults.append(f"{FILE}: line {number} names {match[2]!r} again.")
        else:
            found[match[2]] = match[1]
    return found, faults

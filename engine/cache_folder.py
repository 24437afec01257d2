"""The folder for files of our own (compiled kernels, packed weights, the noise checkpoint), and who may write there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["cache_folder", "make_private", "private_folder", "written_by_others"]


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/verbatim` or `~/.cache/verbatim`; None where this user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "verbatim"
    except RuntimeError:
        return None


def make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, all for this user alone, also where the umask is 000.

    `mkdir(parents=True)` would let everybody write those above, and a file in such a folder cannot be trusted later.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # raises where something else than a folder has this name


def private_folder(folder: Path) -> tuple[Path | None, str]:
    """Make the folder if it is missing, and return it with its links followed; None, and why, if others could write
    there or it cannot be had.
    """
    try:
        make_private(folder)
        real = folder.resolve(strict=True)
        link, status = folder.lstat(), real.stat()
        fault = written_by_others(status) if stat.S_ISDIR(status.st_mode) else "is no folder"
        if not fault and stat.S_ISLNK(link.st_mode) and link.st_uid not in (os.geteuid(), 0):
            fault = "is another user's link"
        for above in (*folder.absolute().parents, *real.parents):
            mode = above.stat().st_mode
            if mode & 0o002 and not mode & stat.S_ISVTX:  # anybody could put another folder in this one's place
                fault = fault or f"lies in {above}, which anybody can write"
    except OSError as error:
        return None, f"{folder}: {error.strerror}"
    return (None, f"{folder} {fault}") if fault else (real, "")


def written_by_others(status: os.stat_result) -> str | None:
    """Say how anybody but this user and root may have written a file or folder; None if nobody may."""
    if status.st_uid not in (os.geteuid(), 0):
        return "belongs to another user"
    if status.st_mode & 0o022:
        return "can be written by other users"
    return None

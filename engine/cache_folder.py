"""The folder for files of our own: compiled kernels and the noise checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "make_private"]


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

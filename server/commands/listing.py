"""The rows of `verbatim models list`: what an entry names, and what of it is there. Loads nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from engine import ModelConfig

__all__ = ["Listed", "listed", "table_of"]


@dataclass(frozen=True, slots=True)
class Listed:
    """One model of a configuration.

    Attributes:
        size: bytes on disk; None where it cannot be told without loading.
        there: whether its files are here, as far as their names say.
    """

    id: str
    source: str
    size: int | None
    load: str
    there: bool
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "source": self.source,
            "bytes": self.size,
            "load": self.load,
            "there": self.there,
            "note": self.note,
        }


def listed(entry: ModelConfig) -> Listed:
    """Return the row of an entry."""
    load = str(getattr(entry, "load", "at_start"))
    if entry.builtin is not None:
        return Listed(entry.id, f"built in: {entry.builtin}", None, load, True)
    if entry.repo is not None:
        folder = _in_hub_cache(entry.repo, entry.revision)
        if folder is None:
            return Listed(entry.id, f"hub: {entry.repo}", None, load, False, "not in the hub's cache; see --pull")
        return _on_disk(entry.id, f"hub: {entry.repo}", folder, load)
    assert entry.path is not None
    return _on_disk(entry.id, str(entry.path), entry.path, load)


def table_of(rows: list[Listed]) -> Table:
    """Return the rows for people."""
    from rich import box
    from rich.table import Table

    from engine import format_bytes
    from server.terminal import one_line

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, side in (("model", "left"), ("size", "right"), ("load", "left"), ("files", "left"), ("source", "left")):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        size = "" if row.size is None else format_bytes(row.size)
        files = "[green]there[/]" if row.there else f"[bold red]missing[/]: {one_line(row.note)}"
        table.add_row(one_line(row.id), size, row.load, files, one_line(row.source))
    return table


def _on_disk(model_id: str, source: str, path: Path, load: str) -> Listed:
    if path.is_file():
        return Listed(model_id, source, path.stat().st_size, load, True)
    if not path.is_dir():
        return Listed(model_id, source, None, load, False, "no such folder or file")
    sizes = {name: (path / name).stat().st_size for name in os.listdir(path) if (path / name).is_file()}
    if "config.json" not in sizes:
        return Listed(model_id, source, sum(sizes.values()), load, False, "no config.json in the folder")
    if not any(name.endswith(".safetensors") for name in sizes):
        return Listed(model_id, source, sum(sizes.values()), load, False, "no .safetensors in the folder")
    return Listed(model_id, source, sum(sizes.values()), load, True)


def _in_hub_cache(repo: str, revision: str | None) -> Path | None:
    """Return the snapshot of a hub id in the local cache, laid out as huggingface_hub lays it out."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    base = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{repo.replace('/', '--')}"
    name = revision or "main"
    reference = base / "refs" / name
    commit = reference.read_text().strip() if reference.is_file() else name
    snapshot = base / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None

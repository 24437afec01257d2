"""Copies models into a bundle, and writes the models.yaml that serves the copies. Loads nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from engine import ModelConfig, checkpoint_files

__all__ = ["copy_models"]

_PLACES = {"path", "repo", "revision", "builtin", "chat_template", "response_template", "adapters"}
"""Keys of an entry that say where something lies."""


def copy_models(entries: Sequence[ModelConfig], root: Path, *, pull: bool) -> None:
    """Copy the checkpoints of entries, their adapters and the templates they name, and write models.yaml.

    Every file is a real one, whatever links led to it, with its time: a model's `created` stays the same.

    Raises:
        LoadError: there is no checkpoint, or it is damaged.
        OSError: a file cannot be copied.
    """
    written: list[dict[str, Any]] = []
    folders: set[str] = set()
    for entry in entries:
        name = _free(entry.id, folders)
        place = Path("models") / name
        found = checkpoint_files(entry, pull=pull)
        for file in found.files:
            _copy(found.root / file, root / place / file)
        path = place / found.files[0] if found.gguf else place
        data: dict[str, Any] = {"id": entry.id, "path": path.as_posix()}
        for key in ("chat_template", "response_template"):
            if (given := getattr(entry, key)) is not None:  # not into the checkpoint's folder, where it could be found
                copy = Path("models") / f"{name}.{key}{given.suffix}"
                _copy(given, root / copy)
                data[key] = copy.as_posix()
        if entry.adapters:
            data["adapters"] = _copy_adapters(entry, root, name)
        given = entry.model_dump(mode="json", exclude_unset=True, exclude=_PLACES)
        written.append({**data, **given})
    text = yaml.safe_dump({"models": written}, sort_keys=False, allow_unicode=True)
    (root / "models.yaml").write_text(text, encoding="utf-8")


def _copy_adapters(entry: ModelConfig, root: Path, name: str) -> list[dict[str, Any]]:
    """Copy an entry's adapters beside its checkpoint; return what its `adapters` says of the copies."""
    written = []
    for adapter in entry.adapters:
        place = Path("models") / f"{name}.adapters" / adapter.name
        for file in adapter.files:
            _copy(file, root / place / file.name)
        written.append({"name": adapter.name, "path": place.as_posix(), "merge": adapter.merge})
    return written


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)  # follows links
    target.chmod(0o644)


def _free(model_id: str, taken: set[str]) -> str:
    """Derive a folder's name from an id, another one for each, and take it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", model_id)[:80].strip("._-") or "model"
    name, number = plain, 1
    while name.lower() in taken:  # some file systems do not tell capitals apart
        number += 1
        name = f"{plain}-{number}"
    taken.add(name.lower())
    return name

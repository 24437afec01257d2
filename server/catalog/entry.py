"""Add an entry to models.yaml without touching what is there: comments, order and layout stay.

The text is extended, not written anew, and what comes out is read again and compared before it takes the file's place.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from engine import ConfigError, read_yaml

__all__ = ["add_entry", "entry_text", "planned", "with_entry"]

_MODELS: Final = re.compile(r"^models:[ \t]*(?:#.*)?$", re.MULTILINE)
_HEAD: Final = "# The models this server offers, by id. Every key: docs/reference/models-yaml.md\nmodels:\n"


def add_entry(file: Path, entry: Mapping[str, Any], comment: str) -> bool:
    """Add an entry to a models.yaml, which is created if it is missing. False: it has that entry already.

    Raises:
        ConfigError: see `planned`; or the file cannot be written.
    """
    text = planned(file, entry, comment)
    if text is None:
        return False
    _replace(file, text)
    return True


def planned(file: Path, entry: Mapping[str, Any], comment: str) -> str | None:
    """Return what a models.yaml will hold with one more entry; None if it has that entry already.

    Args:
        entry: `id` and `path`, the latter relative to the folder of the file.

    Raises:
        ConfigError: the file has another entry of this id, or a form to which no entry can be appended.
    """
    if not file.exists():
        return _HEAD + entry_text(entry, comment, "  ")
    data = read_yaml(file)
    models = data.get("models")
    for there in models if isinstance(models, list) else ():
        if isinstance(there, dict) and there.get("id") == entry["id"]:
            if _same_place(file.parent, there.get("path"), entry["path"]):
                return None
            raise ConfigError(
                f"{file} has a model {entry['id']!r} already, with another path: {there.get('path')}. Rename or remove "
                "that entry first."
            )
    text = file.read_text(encoding="utf-8")
    made = with_entry(text, entry, comment)
    if made is None or _data(made) != {**data, "models": [*(models or ()), dict(entry)]}:
        raise ConfigError(
            f"{file} is not laid out as a list of lines below `models:`; add the entry by hand: {dict(entry)}."
        )
    return made


def with_entry(text: str, entry: Mapping[str, Any], comment: str) -> str | None:
    """Return the text of a models.yaml with one more entry at the end of its list; None if there is no such place."""
    found = _MODELS.search(text)
    if found is None:
        return None
    lines = text.splitlines(keepends=True)
    first = text[: found.start()].count("\n") + 1
    last, indent = first - 1, None
    for number in range(first, len(lines)):
        line = lines[number]
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue  # belongs to what follows, or to nothing
        depth = len(line) - len(line.lstrip(" "))
        if indent is None and bare.startswith("-"):
            indent = " " * depth
        if indent is None or (depth <= len(indent) and not (depth == len(indent) and bare.startswith("-"))):
            break  # the next key of the file
        last = number
    while last + 1 < len(lines) and _deep_comment(lines[last + 1], indent or "  "):
        last += 1  # a comment inside the last entry
    if not lines[last].endswith("\n"):
        lines[last] += "\n"
    added = entry_text(entry, comment, "  " if indent is None else indent)
    return "".join((*lines[: last + 1], added, *lines[last + 1 :]))


def entry_text(entry: Mapping[str, Any], comment: str, indent: str) -> str:
    """Write an entry as lines below `models:`."""
    fields = [f"{key}: {_scalar(value)}" for key, value in entry.items()]
    told = [f"{indent}# {line}\n" for line in comment.splitlines()]
    first, *rest = fields
    return "".join((*told, f"{indent}- {first}\n", *(f"{indent}  {field}\n" for field in rest)))


def _deep_comment(line: str, indent: str) -> bool:
    return line.strip().startswith("#") and len(line) - len(line.lstrip(" ")) > len(indent)


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(value, allow_unicode=True, width=10_000, default_flow_style=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()


def _data(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _same_place(folder: Path, there: Any, wanted: str) -> bool:
    return isinstance(there, str) and os.path.abspath(folder / Path(there).expanduser()) == os.path.abspath(
        folder / wanted
    )


def _replace(file: Path, text: str) -> None:
    """Write a file as a whole: beside it, then in its place. Its mode stays; a link keeps leading to it."""
    target = file.resolve()
    try:
        handle, name = tempfile.mkstemp(prefix=".models-", dir=target.parent)
        try:
            with open(handle, "w", encoding="utf-8", newline="") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(name, target.stat().st_mode & 0o777 if target.exists() else 0o644)
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}.") from None

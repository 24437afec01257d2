"""List the files that make up an entry's checkpoint, so that it can be copied. Reads headers; loads no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.checkpoints.checkpoint import inspect, locate
from engine.config import ModelConfig

__all__ = ["CheckpointFiles", "checkpoint_files"]

_READ: Final = frozenset({".json", ".jinja", ".model", ".txt"})
"""Suffixes of the files, weights aside, from which transformers builds a model and a tokenizer."""
_PAPERS: Final = ("license", "notice", "readme", "use_policy", "copyright")
"""Beginnings of names of files that say under which terms the weights may be passed on."""


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint's files: paths relative to `root`. `gguf`: there is one file, which is everything."""

    root: Path
    files: tuple[Path, ...]
    gguf: bool


def checkpoint_files(config: ModelConfig, *, pull: bool = False) -> CheckpointFiles:
    """List the files of an entry's checkpoint: those that are loaded, and the publisher's terms. Links stay links.

    Other weights in the folder (of another format, of another framework) are left out.

    Raises:
        LoadError: there is no checkpoint, or it is damaged.
    """
    folder = locate(config, pull=pull)
    if folder.is_file():
        return CheckpointFiles(folder.parent, (Path(folder.name),), gguf=True)
    weights = {path.name for path in inspect(folder, config.id).files}
    suffixes = _READ | ({".py"} if config.trust_remote_code else set())
    names = [
        path.relative_to(folder)
        for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja"))
        if path.is_file()
        and not path.name.startswith(".")
        and (path.name in weights or path.suffix in suffixes or path.name.lower().startswith(_PAPERS))
    ]
    return CheckpointFiles(folder, tuple(sorted(names)), gguf=False)

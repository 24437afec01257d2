"""List the files of a checkpoint that a load reads, and hash each of them once, also before what loads is imported."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from engine.checkpoints.checkpoint import TOKENIZER_FILES, Checkpoint, inspect, locate
from engine.config import ModelConfig
from engine.types.model_manifest import ModelManifest

__all__ = ["BytesRead", "EarlyHashes", "files_read", "hash_files", "manifest_of", "remote_code_files"]

BytesRead = Callable[[int, int], None]
"""Told how many bytes of how many were read and hashed so far."""

_CHUNK: Final = 1 << 22
_CONFIGURATIONS: Final = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
_TEMPLATES: Final = "additional_chat_templates/*.jinja"
_INDEX: Final = "model.safetensors.index.json"


def files_read(config: ModelConfig, found: Checkpoint) -> tuple[Path, ...]:
    """List the files of a checkpoint that a load reads: weights, configurations, tokenizer, templates and code.

    A GGUF file is read alone. What an entry names outside the checkpoint, such as a chat template, is no file of it.
    """
    folder = found.folder
    if folder.is_file():
        return (folder,)
    names = [*_CONFIGURATIONS, *_tokenizer_files(folder)]
    if found.files != (folder / "model.safetensors",):
        names.append(_INDEX)
    beside = [path for name in names if (path := folder / name).is_file()]
    templates = [path for path in folder.glob(_TEMPLATES) if path.is_file()]
    return (*found.files, *beside, *sorted(templates), *remote_code_files(config, found))


def remote_code_files(config: ModelConfig, found: Checkpoint) -> tuple[Path, ...]:
    """List the Python files of a checkpoint if the entry lets them run; else none of them is read."""
    if not config.trust_remote_code or found.folder.is_file():
        return ()
    return tuple(sorted(path for path in found.folder.rglob("*.py") if path.is_file()))


def hash_files(files: Sequence[Path], read: BytesRead | None = None) -> dict[Path, str]:
    """Hash the contents of files (SHA-256, hexadecimal), several at a time, each read once.

    Args:
        read: told how far it is, at most once for each percent and at the end; by any thread, one at a time.
    """
    count = _Count(sum(file.stat().st_size for file in files), read) if read is not None else None
    with ThreadPoolExecutor(max_workers=min(4, len(files) or 1)) as pool:  # hashlib lets go of the interpreter lock
        return dict(zip(files, pool.map(lambda file: _digest(file, count), files), strict=True))


def manifest_of(config: ModelConfig, found: Checkpoint, digests: Mapping[Path, str]) -> ModelManifest:
    """Build the manifest from the files' digests. A checkpoint that is one file is named within its own folder."""
    folder = found.folder if found.folder.is_dir() else found.folder.parent
    name = config.repo or config.builtin or found.folder.name
    return ModelManifest.of(name, {path.relative_to(folder).as_posix(): digest for path, digest in digests.items()})


def _tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Name the files that a tokenizer is made of: tokenizer.json alone, or all that others consist of."""
    return ("tokenizer.json",) if (folder / "tokenizer.json").exists() else (*TOKENIZER_FILES, "merges.txt")


class EarlyHashes:
    """Hashes an entry's files while the libraries are imported that load it. Says nothing of what is wrong with them.

    Args:
        read: as for `hash_files`.
    """

    def __init__(self, config: ModelConfig, read: BytesRead | None = None) -> None:
        self._config, self._read = config, read
        self._folder: Path | None = None
        with contextlib.suppress(Exception):  # whatever it is, the load says it
            self._folder = locate(config, pull=False)  # here: it imports the hub's library, which two threads must not
        self._states: list[tuple[int, ...]] = []
        self._found: dict[Path, str] = {}
        self._thread = threading.Thread(target=self._hash, name="early hashes", daemon=True)
        self._thread.start()

    def of(self, files: Sequence[Path], read: BytesRead | None = None) -> dict[Path, str]:
        """Return the digests of these files, as `hash_files`. They are hashed now unless they were, and are as then."""
        self._thread.join()
        if tuple(self._found) == tuple(files) and _states(files) == self._states:
            return self._found
        return hash_files(files, read)

    def _hash(self) -> None:
        with contextlib.suppress(Exception):
            if self._folder is None:
                return
            files: tuple[Path, ...] = (self._folder,)
            if self._folder.is_dir():
                files = files_read(self._config, inspect(self._folder, self._config.id))
            self._states = _states(files)
            self._found = hash_files(files, self._read)


def _states(files: Sequence[Path]) -> list[tuple[int, ...]]:
    """Return what changes when a file does."""
    found = [file.stat() for file in files]
    return [(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in found]


class _Count:
    """Counts what several threads read, and tells of each percent."""

    def __init__(self, total: int, tell: BytesRead) -> None:
        self._total, self._tell = total, tell
        self._read = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            before, self._read = self._read, min(self._read + count, self._total)  # a file that grows meanwhile
            if self._read * 100 // self._total > before * 100 // self._total:
                self._tell(self._read, self._total)


def _digest(path: Path, count: _Count | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if count is not None:
                count.add(len(chunk))
    return digest.hexdigest()

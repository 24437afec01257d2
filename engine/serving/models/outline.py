"""`Outline`: what is known of a model before it is loaded, from the headers of its checkpoint. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from engine.checkpoints import checkpoint
from engine.checkpoints.checkpoint import Checkpoint
from engine.config import ModelConfig, adapter_id
from engine.host_memory import free_memory

__all__ = ["HostMemory", "MemoryView", "Outline", "outline_of"]

_GPU_NODES: Final = ("/dev/nvidiactl", "/dev/dxg")
"""Device files that are there where torch may find a GPU: Linux's driver, and Windows' beneath WSL."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a checkpoint says of itself.

    Attributes:
        name: of the checkpoint, as its manifest and receipts have it.
        created: Unix seconds of its newest file.
        architecture: as its configuration names it; None for a GGUF file.
        weight_bytes: size of the tensors on disk.
        needed: bytes of memory that the weights take when they are loaded on a CPU; None where that is not known before
            loading: on a GPU.
    """

    name: str
    created: int
    architecture: str | None
    weight_bytes: int
    needed: int | None


class MemoryView(Protocol):
    """What the registry asks about memory before it loads a model."""

    def free(self) -> int | None:
        """Return the bytes that are free; None if that is not known."""

    def outline(self, config: ModelConfig) -> Outline | None:
        """Return what is known of a model before it is loaded; None if it cannot be read. May take a while."""


class HostMemory:
    """The memory of this machine, and checkpoints on its disks."""

    def free(self) -> int | None:
        return free_memory()

    def outline(self, config: ModelConfig) -> Outline | None:
        """Read the headers of a checkpoint. What is wrong with it is told when it is loaded."""
        try:
            return outline_of(config)
        except Exception:  # whatever a library makes of a stranger's file
            return None


def outline_of(config: ModelConfig) -> Outline:
    """Read the headers of an entry's checkpoint. Nothing is downloaded.

    Raises:
        LoadError: it is not there, or damaged.
    """
    folder = checkpoint.locate(config, pull=False)
    if folder.is_file():
        from engine.checkpoints import gguf_file

        found = gguf_file.inspect(gguf_file.open_file(folder, config.id))
    else:
        found = checkpoint.inspect(folder, config.id)
    names = found.config.get("architectures")
    named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    name, merged = config.repo or config.builtin or found.folder.name, config.merged_adapter
    return Outline(
        name=adapter_id(name, merged.name) if merged else name,
        created=found.created,
        architecture=named[:200] if named else None,
        weight_bytes=found.stored_bytes,
        needed=_needed(config, found),
    )


def _needed(config: ModelConfig, found: Checkpoint) -> int | None:
    """Estimate what `engine/loading/placement.py` will compare with the free memory, or less."""
    if config.device != "cpu" and (config.device != "auto" or any(map(_exists, _GPU_NODES))):
        return None
    packed = "gguf" in found.config and config.quantization is None and not config.merged_adapter
    if packed or found.config.get("quantization_config") is not None:
        return found.stored_bytes
    if config.dtype not in ("auto", "float32"):
        return found.parameters * 2
    streamed = found.folder.is_dir() and config.merged_adapter is None
    return found.packed_bytes(config.quantization) if streamed else found.float32_bytes()


def _exists(path: str) -> bool:
    return Path(path).exists()

"""Name everything that a model's packed weights depend on: the key of a kept file. Reads no weight."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.checkpoints.checkpoint import Checkpoint
from engine.compute.cpu.kernels import Kernels
from engine.config import ModelConfig
from engine.loading import fingerprint
from engine.loading.manifest import hash_files
from engine.loading.placement import Placement
from engine.types import versions
from engine.types.fingerprint_parts import Part, digest_of

__all__ = ["parts_of"]


def parts_of(
    config: ModelConfig,
    found: Checkpoint,
    placement: Placement,
    digests: Callable[[], Mapping[Path, str]],
    packs: bool,
    kernels: Kernels,
) -> dict[str, Part]:
    """Return what decides every bit of a model's packed weights, and their layout.

    Args:
        digests: returns the SHA-256 of the checkpoint's files.
        packs: weights are packed while they are read.
    """
    folder = found.folder if found.folder.is_dir() else found.folder.parent
    adapter = config.merged_adapter
    return {
        **fingerprint.library_parts(("gguf", *fingerprint.QUANTISERS)),
        "verbatim": versions.PROJECT_VERSION,
        "code": _digest_of_code(),
        "kernels": kernels.digest,
        "files": digest_of({path.relative_to(folder).as_posix(): digest for path, digest in digests().items()}),
        "quantization": config.quantization,
        "dtype": str(placement.dtype),
        "stored": str(placement.stored),
        "rounds": placement.rounds,
        "streamed": packs,
        "adapter": digest_of(list(hash_files(adapter.files).values())) if adapter else None,
    }


def _digest_of_code() -> str:
    """Hash the engine's own files: a checkout under work changes without its version."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

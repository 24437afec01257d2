"""`ModelManifest`: the files of a checkpoint and their digests, in the layout of OpenSSF model signing. Reads no file.

Format: https://github.com/sigstore/model-transparency, version 1.0 of its predicate. The manifest of a signed model can
be compared with it file by file. A signed manifest may name more files: here are those that a load reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

__all__ = ["PREDICATE_TYPE", "ModelManifest"]

PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """The files that a load of a checkpoint reads.

    Attributes:
        name: of the checkpoint's folder or file, or its hub id; for people only.
        files: path within the checkpoint, with slashes, and SHA-256 in hexadecimal, in the order of the paths.
    """

    name: str
    files: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, name: str, digests: Mapping[str, str]) -> ModelManifest:
        """Build one from digests by path."""
        # Folder by folder, as the format's own tool sorts: "a/b" comes before "a-b".
        return cls(name, tuple(sorted(digests.items(), key=lambda item: PurePosixPath(item[0]))))

    @property
    def digest(self) -> str:
        """The root digest: SHA-256 over the files' digests, as bytes, one after the other."""
        return hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in self.files)).hexdigest()

    @property
    def subject(self) -> dict[str, Any]:
        """What an in-toto statement about the model names as its subject."""
        return {"name": self.name, "digest": {"sha256": self.digest}}

    @property
    def predicate(self) -> dict[str, Any]:
        """How the files were hashed, and their digests. Links are followed, as the hub's cache consists of them."""
        return {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": True,
                "ignore_paths": [],
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in self.files],
        }

"""Digest what the bits of a reply depend on. Knows files and versions; nothing of requests.

Same fingerprint, same request ⇒ same bytes. So it covers everything that can change a bit, and nothing else: not the
path, the port, the number of sequences or the size of the cache; the number of threads only where the law does not
hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.loading import versions

KERNELS = "4"
"""Raised by hand whenever a change to attention, linear layers, the sampler or the generator may change bits."""

_CHUNK = 1 << 22


def weights_digest(files: Sequence[Path]) -> str:
    """Hash the contents of the files with the weights, in the order given (SHA-256)."""
    with ThreadPoolExecutor(max_workers=min(4, len(files) or 1)) as pool:  # hashlib lets go of the interpreter lock
        digests = list(pool.map(_file_digest, files))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash a tokenizer's rules and special tokens, whatever files they came from."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps(named, sort_keys=True).encode())
    return digest.hexdigest()


def fingerprint(parts: Mapping[str, object]) -> str:
    """Return `vb-` and 16 hex digits of the SHA-256 of `parts` as canonical JSON, with the library versions added.

    A library outside the tried versions (engine/loading/versions.py) is added by its name.
    """
    everything = {
        **parts,
        "kernels": KERNELS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llguidance": metadata.version("llguidance"),  # which tokens a grammar allows and forces
    }
    if found := versions.untried():
        everything["untried"] = found
    text = json.dumps(everything, sort_keys=True, default=str, ensure_ascii=True)
    return "vb-" + hashlib.sha256(text.encode()).hexdigest()[:16]

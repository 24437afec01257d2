"""Compare what a configuration claims with what the weights hold, before anything is built from it.

transformers builds what a configuration says: ten million layers take minutes, and a table of ten million rows takes
gigabytes, before anything notices that the weights are missing. Knows names and sizes; loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from engine.checkpoints.checkpoint import Checkpoint
from engine.errors import LoadError
from engine.host_memory import format_bytes

__all__ = ["check_config", "check_gguf", "check_size"]

_LARGEST: Final = 1 << 63
"""torch counts with signed 64-bit numbers."""
_DEEP: Final = re.compile(r"(^|_)(n_layer|layers|depths?|stages|blocks)$")
"""Keys that say how often something is built; `max_window_layers` is not one of them."""
_MANY: Final = re.compile(r"^(num|n)_|(experts|groups|heads|codebooks|quantizers|channels|ngram)$")
"""Keys that say how many of something there are; libraries go through them one by one."""
_POSITIONS: Final = re.compile(r"positions?|ctx|embeddings$|_tokens?$")
_SPARE_LAYERS: Final = 256
"""How many more layers than tensors a configuration may name: some parts have no weights in the files."""
_MOST_MANY: Final = 1 << 16
_MOST_POSITIONS: Final = 1 << 31
_SPARE_VALUES: Final = 1 << 24
_BUFFERS: Final = 1 << 31
"""Bytes of the tables that a model computes itself. The largest are masks of some hundred MiB."""


def check_config(found: Checkpoint, name: str) -> None:
    """Refuse a configuration with impossible numbers, above all numbers of layers and other parts to build.

    Raises:
        LoadError: names the key, its value and what the files hold.
    """
    for key, value in _numbers(found.config):
        own = key.rpartition(".")[2]
        if abs(value) >= _LARGEST:
            raise LoadError(f"{name}: config.json says {key} = {_short(value)}, which no 64-bit number holds.")
        if _DEEP.search(own) and not own.startswith("max_"):
            most = found.tensors + _SPARE_LAYERS
            if value > most:
                raise LoadError(
                    f"{name}: config.json says {key} = {value}, and the weights hold {found.tensors} tensors: "
                    "it is not theirs."
                )
        elif _POSITIONS.search(own):
            _limit(name, key, value, _MOST_POSITIONS)
        elif _MANY.search(own):
            _limit(name, key, value, max(_MOST_MANY, found.longest))


def check_gguf(metadata: Mapping[str, Any], sizes: Mapping[str, int], name: str) -> None:
    """Refuse a GGUF header with impossible numbers: transformers makes a configuration of its keys."""
    largest = max(sizes.values(), default=0)
    for key, value in metadata.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or key.startswith(("general.", "tokenizer.", "split."))
        ):
            continue
        own = key.rpartition(".")[2]
        deep = "block_count" in own or "layers" in own
        most = len(sizes) + _SPARE_LAYERS if deep else _MOST_POSITIONS
        if own in ("embedding_length", "feed_forward_length", "vocab_size"):
            most = largest
        if own.endswith(("_count", "head_count_kv")) and not deep:
            most = _MOST_MANY
        _limit(name, key, value, most)


def check_size(parameters: int, buffers: int, found: Checkpoint, name: str) -> None:
    """Refuse a model that needs more numbers than the files can hold.

    Args:
        parameters: of the model as the configuration describes it, tied ones once.
        buffers: bytes of the tables that it computes.
    """
    packed = found.config.get("quantization_config") is not None
    most = 8 * found.stored_bytes if packed else 2 * found.values  # packed: at least one bit each
    if parameters > most + _SPARE_VALUES:
        raise LoadError(
            f"{name}: config.json describes a model of {parameters} parameters, and the weights hold {found.values} "
            "numbers: it is not theirs."
        )
    if buffers > _BUFFERS + found.stored_bytes:
        raise LoadError(f"{name}: config.json describes a model whose tables need {format_bytes(buffers)}.")


def _limit(name: str, key: str, value: int, most: int) -> None:
    if value > most:
        raise LoadError(f"{name}: {key} = {_short(value)} is beyond {most}, which is more than any model has.")


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Collect the whole numbers of a configuration and of those inside it, by dotted name. Its depth is bounded."""
    for key, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from _numbers(item, f"{prefix}{key[:60]}.")
            elif isinstance(item, int) and not isinstance(item, bool):
                yield f"{prefix}{key[:60]}", item
            elif isinstance(item, float) and item.is_integer() and abs(item) < _LARGEST:
                yield f"{prefix}{key[:60]}", int(item)


def _short(value: int) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}… ({len(text)} digits)"

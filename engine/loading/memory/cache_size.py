"""Size the context and the cache by the entry, the model and the free memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine.compute.kv_cache import KEY_BLOCK, LayerShape
from engine.config import ModelConfig
from engine.errors import LoadError, NotEnoughMemory
from engine.host_memory import format_bytes
from engine.scheduling.block_pool import BLOCK_SIZE

_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions", "n_positions")
"""What configurations call the number of positions that a model was built for."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The context length that the cache holds, and its number of blocks."""

    context_length: int
    blocks: int

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK_SIZE

    def of_at_most(self, blocks: int) -> CacheSize:
        """Return this size, or if it has more blocks, one of so many and the context that they hold."""
        return self if blocks >= self.blocks else CacheSize(min(self.context_length, blocks * BLOCK_SIZE), blocks)


def context_length(config: ModelConfig, model: nn.Module) -> int:
    """Return how many tokens a sequence may have, memory aside.

    Raises:
        LoadError: the entry asks for more than the model was built for.
    """
    text = model.config.get_text_config()  # type: ignore[operator,union-attr]
    said = (getattr(text, name, None) for name in _CONTEXT_NAMES)
    # Missing or unbounded: a length that most machines can hold.
    trained = next((int(number) for number in said if isinstance(number, int) and number > 0), 32768)
    if config.context_length and config.context_length > trained:
        raise LoadError(f"{config.id}: context_length is {config.context_length}, the model was built for {trained}.")
    return config.context_length or trained


def size_cache(
    config: ModelConfig, wanted: int, layers: tuple[LayerShape, ...] | None, room: Mapping[torch.device, int]
) -> CacheSize:
    """Size the cache for sequences of up to `wanted` tokens, never larger than all sequences together can use.

    Args:
        layers: what each layer stores; None in the fallback runner, where blocks only count tokens.
        room: bytes that the cache may take on each device of a layer, unless the entry says how many in all.

    Raises:
        NotEnoughMemory: one sequence of the length that the entry asks for does not fit.
    """
    most = -(-wanted // BLOCK_SIZE) * config.max_sequences
    if layers is None:  # transformers allocates its own caches
        return CacheSize(wanted, most)
    if config.cache_size:
        shares = [(sum(layer.bytes_per_token for layer in layers), config.cache_size)]
    else:
        shares = [(per_token, max(room[device], 0)) for device, per_token in per_token_on_each(layers).items()]
    fitting = [(max(given - per_token * KEY_BLOCK, 0) // (per_token * BLOCK_SIZE)) for per_token, given in shares]
    size = CacheSize(wanted, most).of_at_most(min(fitting))
    check_least(config, size, shares[fitting.index(min(fitting))])
    return size


def check_least(config: ModelConfig, size: CacheSize, share: tuple[int, int]) -> None:
    """Refuse a cache that cannot hold one sequence of the length that the entry asks for.

    Args:
        share: of the device with the least room: the cache's bytes per token, and the bytes that it may take.

    Raises:
        NotEnoughMemory: it is too small.
    """
    (per_token, room), least = share, -(-(config.context_length or 2) // BLOCK_SIZE)
    needed = per_token * (least * BLOCK_SIZE + KEY_BLOCK)
    if size.blocks < least:
        raise NotEnoughMemory(
            f"{config.id}: the cache for {least * BLOCK_SIZE} tokens needs {format_bytes(needed)}, "
            f"{format_bytes(room)} are given to it; lower context_length or raise cache_size.",
            needed=needed,
            free=room,
        )


def per_token_on_each(layers: Iterable[LayerShape]) -> Mapping[torch.device, int]:
    """Return how many bytes a token's keys and values take on each device."""
    found: Counter[torch.device] = Counter()
    for layer in layers:
        found[layer.device] += layer.bytes_per_token
    return found

"""Size the context and the cache by the entry, the model and the free memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engine.compute.kv_cache import KEY_BLOCK, LayerShape
from engine.config import ModelConfig
from engine.errors import LoadError, NotEnoughMemory
from engine.host_memory import format_bytes
from engine.loading.placement import Placement
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
    config: ModelConfig, wanted: int, layers: tuple[LayerShape, ...] | None, placement: Placement
) -> CacheSize:
    """Size the cache for sequences of up to `wanted` tokens, never larger than all sequences together can use.

    Args:
        layers: what each layer stores; None in the fallback runner, where blocks only count tokens.

    Raises:
        NotEnoughMemory: one sequence of the length that the entry asks for does not fit.
    """
    most = -(-wanted // BLOCK_SIZE) * config.max_sequences
    if layers is None:  # transformers allocates its own caches
        return CacheSize(wanted, most)
    per_token = sum(layer.bytes_per_token for layer in layers)
    per_block, spare = per_token * BLOCK_SIZE, per_token * KEY_BLOCK
    room = config.cache_size or placement.cache_room()
    blocks = min(max(room - spare, 0) // per_block, most)
    least = -(-(config.context_length or 2) // BLOCK_SIZE)
    if blocks < least:
        raise NotEnoughMemory(
            f"{config.id}: the cache for {least * BLOCK_SIZE} tokens needs {format_bytes(least * per_block + spare)}, "
            f"{format_bytes(room)} are given to it; lower context_length or raise cache_size.",
            needed=least * per_block + spare,
            free=room,
        )
    return CacheSize(min(wanted, blocks * BLOCK_SIZE), blocks)

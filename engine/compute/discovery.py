"""Find out what a model's attention layers store and ask for, by calling it. Knows no model by name."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from engine.compute.attention import Discovery, attention_through, blank_mask
from engine.compute.attention_mask import NotUnderstood
from engine.errors import out_of_memory

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""Names of the cache in transformers' models, as argument and in their output; recurrent models use the last two."""
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "dense", "sparse"})
"""Values of `layer_types` that concern only which keys are seen, or the kind of feed-forward network."""


def discover(model: nn.Module, length: int) -> Discovery:
    """Run two tokens through the model and note what each attention layer stores and how it attends.

    Args:
        length: how many tokens a sequence may have.

    Returns:
        A record whose `layers` and `settings` are complete.

    Raises:
        NotUnderstood: the model does not send each of its layers through the attention interface once, or asks for
            something that is not known here.
    """
    text = model.config.get_text_config()  # type: ignore[operator,union-attr]
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if strange:
        raise NotUnderstood(f"it has layers of type {', '.join(strange)}")
    discovery = Discovery(length)
    logits = _observe(model, discovery, use_cache=False)
    if sorted(discovery.layers) != list(range(text.num_hidden_layers)):
        raise NotUnderstood(
            f"only {len(discovery.layers)} of its {text.num_hidden_layers} layers call the attention interface"
        )
    _check_positions(model, discovery)
    discovery.skips_masks = _skips_masks(model, discovery, logits)
    return discovery


def _observe(model: nn.Module, discovery: Discovery, **arguments: Any) -> Tensor:
    """Run two tokens, the last ones of a sequence, through the model without attending to anything.

    Returns:
        The logits that this gives.
    """
    device = input_device(model)
    first = max(discovery.length - 2, 0)
    positions = torch.arange(first, first + 2, device=device)[None]
    with torch.inference_mode(), attention_through(discovery):
        output = model(torch.zeros(1, 2, dtype=torch.int64, device=device), position_ids=positions, **arguments)
    logits: Tensor = output.logits
    return logits


def _skips_masks(model: nn.Module, discovery: Discovery, logits: Tensor) -> bool:
    """Tell whether a `blank_mask` keeps the model from making masks, and changes no bit of what reaches attention."""
    other = Discovery(discovery.length, masked=True)
    try:
        same = torch.equal(_observe(model, other, use_cache=False, attention_mask=blank_mask(logits.device)), logits)
    except Exception as error:  # an architecture that does something else with its mask
        if out_of_memory(error):
            raise
        return False
    pairs = [(states, other.states.get(layer)) for layer, states in discovery.states.items()]
    return same and not other.masks and all(b is not None and all(map(torch.equal, a, b)) for a, b in pairs)


class _FarCache(DynamicCache):  # type: ignore[misc]
    """A cache that claims to have seen many tokens and stores none."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._length

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        return self._length

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self._length + 2, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _check_positions(model: nn.Module, discovery: Discovery) -> None:
    """Check that what reaches attention depends on the positions that the model is told.

    Raises:
        NotUnderstood: a layer uses the number of tokens that its cache has seen (Llama 4's temperature): the
            packed pass has no such cache.
    """
    name = cache_name(model)
    if name is None:
        return
    other = Discovery(discovery.length)
    _observe(model, other, use_cache=True, **{name: _FarCache(max(discovery.length - 2, 0))})
    for layer, states in discovery.states.items():
        pairs = zip(states, other.states.get(layer, ()), strict=True)
        if not all(torch.allclose(one, two, rtol=1e-4, atol=1e-5) for one, two in pairs):
            raise NotUnderstood(f"layer {layer} counts positions by its cache, not by those it is told")


def cache_name(model: nn.Module) -> str | None:
    """Return the keyword by which the model takes a cache; None if it takes none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model's token ids must be."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = getattr(embedding, "device", None) or embedding.weight.device
    return device


def embedding_rows(model: nn.Module) -> int:
    """Return how many token ids a model embeds."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.num_embeddings if hasattr(embedding, "device") else embedding.weight.shape[0]
    return int(rows)

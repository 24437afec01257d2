"""The attention function that transformers' models call. Knows no model by name and computes nothing itself.

All sequences of a step form one packed row of tokens, `[1, T]`. The step's plan, which knows the rows of each sequence,
reaches this file through a context variable, because many models drop keywords on the way to their layers. Before a
model is served, a `Discovery` takes the plan's place and records what each layer asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from engine.compute.attention_mask import KeyRange, NotUnderstood, read_mask
from engine.compute.backend import AttentionSettings, StepPlan
from engine.compute.kv_cache import LayerShape

IMPLEMENTATION = "verbatim"
"""The name under which transformers finds `attention_forward`."""

_HARMLESS = frozenset({"dropout", "position_ids", "use_cache", "return_dict", "logits_to_keep"})
"""Keywords of the attention interface that have no effect here, like those that ask for more output (`output_…`):
models are served in evaluation mode, and queries and keys contain their positions already."""


@dataclass(slots=True)
class Discovery:
    """Records what each attention layer stores and asks for during a pass, and attends to nothing.

    `length`: how many tokens a sequence may have; masks are tried up to there. `masked`: the model is given
    `blank_mask`, so that its layers' masks tell nothing. `skips_masks`: whether that changes nothing else.
    """

    length: int
    masked: bool = False
    skips_masks: bool = False
    layers: dict[int, LayerShape] = field(default_factory=dict)
    settings: dict[int, AttentionSettings] = field(default_factory=dict)
    states: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """By layer: queries, keys and values as they reached the attention interface."""
    masks: list[KeyRange | None] = field(default_factory=list)
    """The key ranges of the masks made in this pass; None: not understood. Mask n passes through the model as a tensor
    filled with n + 1."""

    def shapes(self) -> tuple[LayerShape, ...]:
        """Return what each layer stores, in order."""
        return tuple(self.layers[i] for i in range(len(self.layers)))

    def note_mask(self, function: Any, device: torch.device | str) -> float:
        """Read which keys a mask function shows; return the number that stands for the mask."""
        try:
            self.masks.append(read_mask(function, self.length, device))
        except NotUnderstood:  # perhaps no layer uses it
            self.masks.append(None)
        return float(len(self.masks))

    def note_layer(
        self, layer: int, states: tuple[Tensor, Tensor, Tensor], settings: AttentionSettings, seen: KeyRange
    ) -> None:
        """Record a layer's call. Raises NotUnderstood if it is not its first."""
        if layer in self.layers:
            raise NotUnderstood(f"layer {layer} attends more than once")
        _, key, value = states
        heads = key.shape[1]
        self.layers[layer] = LayerShape(
            heads, key.shape[-1], value.shape[-1], key.dtype, key.device, seen, settings.heads // heads
        )
        self.settings[layer] = settings
        self.states[layer] = states

    def key_range(self, mask: Tensor | None, window: int | None, others: dict[str, Any]) -> KeyRange:
        """Return which keys a layer's mask and keywords show together.

        Raises:
            NotUnderstood: the mask was not made through transformers' interface, a keyword is not known, or two
            disagree.
        """
        if self.masked:
            return KeyRange()
        given = [name for name, value in others.items() if value is not None]
        unknown = sorted(name for name in given if name not in _HARMLESS and not name.startswith("output_"))
        if unknown:
            raise NotUnderstood(f"its attention takes {', '.join(unknown)}")
        if mask is None:
            seen = KeyRange()
        else:
            known = self._mask_of(mask)
            if known is None:
                raise NotUnderstood("its attention mask is neither causal, a sliding window nor chunks")
            seen = known
        window = window if window and window < self.length else None
        if window is not None and seen != KeyRange(window=window):
            raise NotUnderstood(f"its attention asks for a window of {window}, its mask shows {seen.describe()}")
        return seen

    def _mask_of(self, placeholder: Tensor) -> KeyRange | None:
        """Return the mask that a tensor stands for; None if it is not understood, or was changed on its way."""
        number = placeholder.flatten()[0]
        if placeholder.dim() != 4 or not bool((placeholder == number).all()):
            return None
        return self.masks[int(number) - 1] if number in range(1, len(self.masks) + 1) else None


_receiver: ContextVar[StepPlan | Discovery] = ContextVar("verbatim_attention_receiver")


@contextmanager
def attention_through(receiver: StepPlan | Discovery) -> Iterator[None]:
    """Let the attention layers that run inside the `with` block call `receiver`."""
    token = _receiver.set(receiver)
    try:
        yield
    finally:
        _receiver.reset(token)


def current_plan() -> StepPlan | None:
    """Return the plan of the step that is running; None outside a step and while a model is discovered."""
    receiver = _receiver.get(None)
    return None if isinstance(receiver, Discovery) else receiver


def register_attention() -> None:
    """Register the attention function and its masks with transformers; safe to call again."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, make_mask)


def make_mask(*, mask_function: Any, q_length: int, device: torch.device | str = "cpu", **kwargs: Any) -> Tensor | None:
    """Implement transformers' mask interface: note which keys the mask function shows.

    Returns a tensor by which `attention_forward` recognises the mask; None in a step: the layers' masks are known.
    """
    receiver = _receiver.get()
    if not isinstance(receiver, Discovery):
        return None
    return torch.full(
        (1, 1, q_length, q_length), receiver.note_mask(mask_function, device), dtype=torch.float32, device=device
    )


def blank_mask(device: torch.device) -> Tensor:
    """Make the mask that keeps transformers from making one: `[1, 1, 1, 1]`, of four dimensions, it is taken as it is.

    Making one, transformers asks the GPU in every pass whether the positions are those of one sequence, and waits. The
    keys that a layer sees are known by then, and `attention_forward` looks at no mask in a step.
    """
    return torch.zeros(1, 1, 1, 1, dtype=torch.float32, device=device)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Implement transformers' attention interface with the running step's plan.

    Args:
        query: `[1, heads, T, key_dim]`; key and value `[1, kv_heads, T, dim]`, position-encoded.
        softcap: bound of the scores; s_aux: `[heads]` sinks.

    Returns:
        `[1, T, heads, value_dim]`, and None for the weights.

    Raises:
        NotUnderstood: the model asks for something that is not known here; only while it is discovered.
    """
    receiver = _receiver.get()
    layer: int = module.layer_idx
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    settings = AttentionSettings(query.shape[1], scale, softcap, s_aux)
    if isinstance(receiver, Discovery):
        seen = receiver.key_range(attention_mask, sliding_window, kwargs)
        if is_causal is False or not getattr(module, "is_causal", True):
            raise NotUnderstood("its attention is not causal: a cache of past keys cannot serve it")
        receiver.note_layer(layer, (query, key, value), settings, seen)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
    return receiver.attend(layer, query[0], key[0], value[0], settings).unsqueeze(0), None

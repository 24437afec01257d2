"""Pin or reset rotary embeddings that transformers changes while it runs. Knows no model by name.

Two kinds of scaling look at the longest sequence of a call (`max(position_ids)`, transformers' modeling_rope_utils), so
in a packed step one long neighbour would change everybody's numbers:

* `longrope` (Phi-3) chooses between two sets of frequencies. `pin` fixes the set once for the loaded model, by its
  context length: what plain transformers uses for a sequence that fills it (decision 0017).
* `dynamic` computes frequencies anew for every length, and remembers the longest it saw. It cannot be fixed without
  being another function, so such a model runs in the fallback runner, which calls `reset` before each pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PINNED = "pinned"
_ORIGINAL = "original_max_position_embeddings"


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Return the scaling of a rotary module by type of layer (None: one for all); empty for any other module."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {None: kinds}
    return dict(kinds) if isinstance(kinds, dict) else {}


@torch.no_grad()
def pin(model: nn.Module, context_length: int) -> str | None:
    """Fix the frequencies of every LongRoPE module for sequences of up to `context_length` tokens.

    Returns:
        Which set was taken, `long` or `short`; None if there is no such module, or it cannot be fixed.
    """
    taken = None
    for module in model.modules():
        for layer_type, kind in _kinds(module).items():
            if kind == "longrope":
                taken = _pin(module, layer_type, context_length)
    return taken


def _pin(module: Any, layer_type: str | None, context_length: int) -> str | None:
    # transformers chooses the set when it is called with the last position of the context; then the set is pinned.
    prefix = "" if layer_type is None else f"{layer_type}_"
    device = getattr(module, f"{prefix}inv_freq").device
    last = torch.tensor([[context_length - 1]], dtype=torch.int64, device=device)
    x, given = (
        torch.zeros(1, 1, 1, dtype=torch.float32, device=device),
        {} if layer_type is None else {"layer_type": layer_type},
    )
    module(x, last, **given)
    module.rope_type = _PINNED if layer_type is None else {**module.rope_type, layer_type: _PINNED}
    near = module(x, torch.zeros_like(last) + 1, **given)
    both = module(x, torch.cat([torch.zeros_like(last) + 1, last], 1), **given)
    if not all(torch.equal(one, two[:, :1]) for one, two in zip(near, both, strict=True)):
        return None  # it looks at the longest sequence in a way of its own (Phi-3.5-MoE)
    same = torch.equal(getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}original_inv_freq"))
    return "short" if same else "long"


def dynamic(model: nn.Module) -> bool:
    """Tell whether a rotary module of the model changes with the longest sequence it has seen."""
    return any("dynamic" in kind for module in model.modules() for kind in _kinds(module).values())


def original_lengths(model: nn.Module) -> tuple[int, ...]:
    """Return the contexts that the model was first trained with, where its scaling says so: borders between positions.

    A step that has rows on both sides of one shows whether they change each other's frequencies.
    """
    text: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    given = getattr(text, "rope_parameters", None)
    scalings = [given, *given.values()] if isinstance(given, dict) else []
    said = [scaling.get(_ORIGINAL) for scaling in scalings if isinstance(scaling, dict)]
    return tuple(sorted({n for n in (getattr(text, _ORIGINAL, None), *said) if isinstance(n, int) and n > 0}))


def reset(model: nn.Module) -> None:
    """Let every `dynamic` module forget the sequences it has seen, as if it were new."""
    for module in model.modules():
        for layer_type, kind in _kinds(module).items():
            if "dynamic" in kind:
                _reset(module, "" if layer_type is None else f"{layer_type}_")


def _reset(module: Any, prefix: str) -> None:
    original: Tensor | None = getattr(module, f"{prefix}original_inv_freq", None)
    longest = f"{prefix}max_seq_len_cached"
    if original is not None and getattr(module, longest, None) != module.original_max_seq_len:
        module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
        setattr(module, longest, module.original_max_seq_len)

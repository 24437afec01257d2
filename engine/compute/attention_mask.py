"""Find which keys a token sees, from the mask function that transformers would use. Knows no model by name.

transformers describes every mask as a predicate `mask_function(batch, head, query, key) -> bool`. It is called at many
positions, far ones too, so that a window or a chunk of any length is found. A predicate that is neither causal, a
sliding window nor chunks raises `NotUnderstood`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MaskOfRow = Callable[[Tensor, Tensor], Tensor]

_WHOLE, _NEAR = 1 << 17, 64
"""Rows of up to `_WHOLE` keys are compared in full; of longer ones a sample, and `_NEAR` on each side of a border."""


class NotUnderstood(Exception):
    """A model asks for something that a runner does not support; the message says what."""


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The keys that a token sees: from `first(position)` to its own.

    Attributes:
        window: the most keys that are seen, the token's own included; None: no such bound.
        chunk: the length of a chunk; only keys of the token's own chunk are seen; None: no such bound.
    """

    window: int | None = None
    chunk: int | None = None

    def first(self, position: Tensor) -> Tensor:
        """Return the first key that is seen: `[…] int64`, the same shape as `position`."""
        first = torch.zeros_like(position)
        if self.window is not None:
            first = torch.maximum(first, position - self.window + 1)
        if self.chunk is not None:
            first = torch.maximum(first, position - position % self.chunk)
        return first

    def describe(self) -> str:
        """Describe the range for people: `all keys before`, `a window of 128`, `chunks of 8192`."""
        if self.window is not None:
            return f"a window of {self.window}"
        return f"chunks of {self.chunk}" if self.chunk is not None else "all keys before"


ALL_BEFORE = KeyRange()


def read_mask(function: MaskFunction, length: int, device: torch.device | str = "cpu") -> KeyRange:
    """Find the key range that a mask function describes, for sequences of up to `length` tokens.

    Args:
        device: where the tensors are that the function may hold.

    Raises:
        NotUnderstood: it sees the future, has gaps, or begins where neither a window nor a chunk would; or it fails.
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return function(zero, zero, query, key).expand_as(query + key)

    try:
        every = torch.arange(length, device=device)
        hidden = ~sees(every, zero)  # True from the first token on that does not see key 0
        if not bool(hidden.any()):
            candidates = [KeyRange()]
        else:
            size = int(hidden.to(torch.uint8).argmax())
            candidates = [KeyRange(window=size), KeyRange(chunk=size)] if size else []
        for candidate in candidates:
            queries = [torch.tensor(q, dtype=torch.int64, device=device) for q in _probes(candidate, length)]
            if all(_agrees(candidate, sees, query, length) for query in queries):
                return candidate
    except Exception as error:  # a mask function may be anything
        raise NotUnderstood(f"the mask function fails: {error}") from error
    raise NotUnderstood("the mask is neither causal, a sliding window nor chunks")


def _agrees(candidate: KeyRange, sees: MaskOfRow, query: Tensor, length: int) -> bool:
    """Compare a row of the mask with the candidate's: all keys, or of very long rows a sample and all near borders."""
    first = candidate.first(query)
    if length <= _WHOLE:
        keys = torch.arange(length, device=query.device)
    else:
        near = torch.arange(-_NEAR, _NEAR, device=query.device)
        spread = torch.arange(0, length, length // _WHOLE, device=query.device)
        keys = torch.cat([spread, near + query, near + first, near + _NEAR]).clamp(0, length - 1)
    return torch.equal(sees(query, keys), (keys <= query) & (keys >= first))


def _probes(keys: KeyRange, length: int) -> list[int]:
    """List queries on both sides of each possible border, and far beyond it."""
    size = keys.window or keys.chunk or length
    near = {0, 1, 2, 3, 17, length // 3, length // 2, length - 2, length - 1}
    borders = {n * size + off for n in (1, 2, 3, length // size) for off in (-2, -1, 0, 1)}
    return sorted(q for q in near | borders if 0 <= q < length)

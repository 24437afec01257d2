"""Masks of bits as grammars make them, out of flags. What tests give to a sampler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def packed(allowed: Sequence[Sequence[bool]] | NDArray[np.bool_]) -> NDArray[np.int32]:
    """Pack flags `[rows, tokens]` into int32 `[rows, ceil(tokens / 32)]`; bits behind the last token are set."""
    flags = np.asarray(allowed, dtype=np.bool_)
    padded = np.pad(flags, ((0, 0), (0, -flags.shape[1] % 32)), constant_values=True)
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)

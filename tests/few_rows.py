"""Whether torch's products keep a row's bits on this processor: with AVX2, MKL takes one to three rows another way."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from engine.compute.linear import quasi_random

WHY = "torch's products of one to three rows have other bits on this processor"


@functools.cache
def few_rows_keep_their_bits() -> bool:
    """Tell whether a mixture of experts can keep the law here without our kernels, by torch's product of few rows."""
    x, weight = quasi_random(8, 64), quasi_random(96, 64)
    whole = F.linear(x, weight)
    return all(torch.equal(F.linear(x[:rows], weight), whole[:rows]) for rows in (1, 2, 3, 5))

"""Randomness as a pure function: (seed, choice, position, token id) → 64 bits. There is no generator state.

Knows nothing of logits or of batches, so the bits of a token are the same wherever they are computed.

The key of a draw folds seed, choice and position, one after the other, through a 64-bit bijection; a token's bits are
then element `id` of the SplitMix64 stream that starts at that key:

    key  = mix(mix(mix(seed + G) + (choice + 1) * G) + (position + 1) * G)        all modulo 2**64
    bits = mix(key + (id + 1) * G)                                                G = 0x9E3779B97F4A7C15

Because every component is mixed before the next is added, neighbouring seeds, choices or positions start streams at
unrelated places: none is a shifted copy of another (but by an accident of about one in 2**45).

Sources: G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64,
which passes BigCrush); its finaliser `mix` is variant 13 of D. Stafford, "Better bit mixing" (2011).

What is identical where. The bits, and the uniforms made of them, are integers and exact dyadic fractions: the same on
every device, thread count and platform. A Gumbel value passes through `log`, whose last digit differs between
libraries (torch's differs from C's in about one value in two thousand), so it is always computed here, by Python's
`math.log` on the host, one number at a time, never in a kernel: the same on every device of one machine, and the same
across machines whose C library rounds `log` alike.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

__all__ = ["GAP_UNIT", "gap_of", "gaps", "gumbel", "hash_token", "stream_key", "token_steps"]

_MASK: Final = 2**64 - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MULTIPLY_1: Final = 0xBF58476D1CE4E5B9
_MULTIPLY_2: Final = 0x94D049BB133111EB

GAP_UNIT: Final = 2.0**-53
"""A gap `g` stands for the uniform `u = 1 - g * GAP_UNIT`."""


def _signed(value: int) -> int:
    """The two's complement reading of 64 bits, as torch's int64 holds them."""
    return value - 2**64 if value >= 2**63 else value


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MULTIPLY_1) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLY_2) & _MASK
    return z ^ (z >> 31)


def stream_key(seed: int, choice: int, position: int) -> int:
    """Return the place where the stream of one draw starts.

    Args:
        seed: any int64, negative ones too.
        choice: index of the choice, 0 for the first; so n = 1 and choice 0 of n = 4 are the same draw.
        position: index of the generated token.

    Returns:
        64 bits as a signed int64.
    """
    key = _mix((seed + _GOLDEN) & _MASK)
    key = _mix((key + (choice + 1) * _GOLDEN) & _MASK)
    return _signed(_mix((key + (position + 1) * _GOLDEN) & _MASK))


def hash_token(key: int, token_id: int) -> int:
    """Return the 64 bits of one token, unsigned. `gaps` computes the same for many tokens."""
    return _mix((key + (token_id + 1) * _GOLDEN) & _MASK)


def gap_of(bits: int) -> int:
    """Return the gap of 64 unsigned bits: their upper 53, made odd, so that the uniform is never 0 or 1."""
    return (bits >> 11) | 1


def gumbel(gap: int) -> float:
    """Return a standard Gumbel variate, `-log(-log(u))` with `u = 1 - gap / 2**53`, between -3.61 and 36.74.

    `gap` is odd and below 2**53, so `u` is exact: one of 2**52 equidistant values, symmetric about one half.
    """
    return -math.log(-math.log(1.0 - gap * GAP_UNIT))


def token_steps(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return what the ids 0 … count - 1 add to a key: int64 `[count]`. Compute it once and keep it."""
    return (torch.arange(count, dtype=torch.int64, device=device) + 1) * _signed(_GOLDEN)


def gaps(keys: Tensor, steps: Tensor) -> Tensor:
    """Return the gaps of many tokens for many draws.

    Args:
        keys: int64 `[rows, 1]`, from `stream_key`.
        steps: int64 `[ids]` or `[rows, ids]`, the wanted places of `token_steps`.

    Returns:
        int64 `[rows, ids]`, odd, in 1 … 2**53 - 1: equal to `gap_of(hash_token(key, id))`. Owned by the caller.
    """
    z = keys + steps
    shifted = torch.empty_like(z)
    for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2)):
        z.bitwise_xor_(_logical_shift(z, shift, shifted)).mul_(_signed(factor))  # int64 products wrap
    z.bitwise_xor_(_logical_shift(z, 31, shifted))
    return _logical_shift(z, 11, shifted).bitwise_or_(1)


def _logical_shift(z: Tensor, by: int, out: Tensor) -> Tensor:
    # torch shifts int64 arithmetically and has no shift for uint64: clear the copies of the sign.
    torch.bitwise_right_shift(z, by, out=out)
    return out.bitwise_and_(2 ** (64 - by) - 1)

"""Edits logits before a token is chosen: biases, penalties, bans and masks. Knows nothing of requests.

Each kind of edit is a function here; the sampler calls them in a fixed order: `bias`, `repetition`, `penalties`, `ban`,
and at last the mask of a grammar.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.sampling.transfer import Part, Upload

__all__ = ["Edits", "ban_table", "bans"]


class Edits:
    """Collects sparse changes to a batch of logits row by row, and applies each kind with one operation.

    Ids outside `0 … width - 1` are ignored: they are banned in any case.

    Call `pack` after the last row, send the upload, then `apply`.

    Args:
        width: columns of the logits that will be edited.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._bias: tuple[list[int], list[float]] = ([], [])
        self._penalties: tuple[list[int], list[float]] = ([], [])
        self._repeats: list[tuple[Tensor, float]] = []
        self._repeated: tuple[list[int], list[float]] = ([], [])
        self._bans: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._bias[0] or self._penalties[0] or self._repeats or self._repeated[0] or self._bans)

    def bias(self, row: int, pairs: tuple[tuple[int, float], ...]) -> None:
        """`logit += bias`; -100 bans. Ids are unique."""
        inside = [(i, b) for i, b in pairs if 0 <= i < self.width]
        self._bias[0].extend(row * self.width + i for i, _ in inside)
        self._bias[1].extend(b if b > -100.0 else -math.inf for _, b in inside)

    def repetition(self, row: int, prompt_ids: Tensor, output_ids: list[int], penalty: float) -> None:
        """`logit / penalty` where positive, else `logit * penalty` (Keskar et al. 2019, as in transformers).

        Args:
            prompt_ids: int64 `[ids]`, all below `width`. An id that is given twice is penalised once.
        """
        self._repeats.append((prompt_ids + row * self.width, penalty))
        inside = [row * self.width + i for i in output_ids if i < self.width]
        self._repeated[0].extend(inside)
        self._repeated[1].extend([penalty] * len(inside))

    def penalties(self, row: int, counts: dict[int, int], frequency: float, presence: float) -> None:
        """`logit -= frequency * count + presence` for every id with a count."""
        inside = [(i, n) for i, n in counts.items() if n > 0 and i < self.width]
        self._penalties[0].extend(row * self.width + i for i, _ in inside)
        self._penalties[1].extend(-(frequency * n + presence) for _, n in inside)

    def ban(self, row: int, ids: tuple[int, ...]) -> None:
        self._bans.extend(row * self.width + i for i in ids if 0 <= i < self.width)

    def pack(self, upload: Upload) -> None:
        """Add everything that the device needs to an upload."""
        self._packed = {
            "bias": (upload.ints(self._bias[0]), upload.floats(self._bias[1])),
            "penalties": (upload.ints(self._penalties[0]), upload.floats(self._penalties[1])),
            "repeated": (upload.ints(self._repeated[0]), upload.floats(self._repeated[1])),
        }
        self._banned = upload.ints(self._bans)

    def apply(self, logits: Tensor) -> None:
        """Change `logits` in place, in the fixed order: float32 `[rows, width]`, contiguous, owned by the caller."""
        flat = logits.view(-1)
        _add(flat, *self._packed["bias"])
        self._penalise_repeats(flat)
        _add(flat, *self._packed["penalties"])
        if self._bans:
            flat.index_fill_(0, self._banned.tensor, -math.inf)

    def _penalise_repeats(self, flat: Tensor) -> None:
        if not self._repeats:
            return
        repeated, penalties = self._packed["repeated"]
        by = [ids.new_full(ids.shape, penalty, dtype=torch.float32) for ids, penalty in self._repeats]
        index = torch.cat([*(ids for ids, _ in self._repeats), repeated.tensor])
        penalty = torch.cat([*by, penalties.tensor.float()])
        before = flat[index]
        # An id that is in the prompt and in the output is written twice, with the same value.
        flat[index] = torch.where(before > 0, before / penalty, before * penalty)


def _add(flat: Tensor, index: Part, values: Part) -> None:
    if len(index):
        flat.index_add_(0, index.tensor, values.tensor.float())


def bans(bits: Tensor, table: Tensor) -> Tensor:
    """Return where the bits of some masks are not set: bool `[rows, 32 * words]`.

    Args:
        bits: int32 `[rows, words]`; bit `i % 32` of word `i // 32` is that of token `i`.
        table: `ban_table()` on the same device.
    """
    return table[bits.view(torch.uint8).int()].view(torch.bool)


def ban_table(device: torch.device) -> Tensor:
    """Return for each of 256 bytes its eight bits, lowest first, each turned over and a byte of its own: int64 `[256]`.

    One look-up unpacks a byte, which is far faster than shifting, on a CPU above all.
    """
    flags = [[not byte >> bit & 1 for bit in range(8)] for byte in range(256)]
    return torch.tensor(flags, dtype=torch.bool).view(torch.int64).view(-1).to(device)

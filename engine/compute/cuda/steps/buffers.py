"""The tensors through which a step reaches the GPU: all integers of a step in one buffer, sent with one transfer.

    host (pinned, two in turn) ──one copy──► device ──views──► tokens, positions, slots, kept rows, tables

The device's buffer never moves, so a CUDA graph that reads it computes whatever step was sent last. Knows tables and
tensors; no model and no request.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from engine.compute.backend import AttentionSettings
from engine.compute.cuda.operations import AttentionWork, Partials
from engine.compute.cuda.steps.tables import ITEM, MERGE, AttentionKind, Limits, StepTables
from engine.compute.kv_cache import LayerShape

__all__ = ["StepBuffers", "StepViews", "kind_of"]

_COPIES: Final = 2
"""Blocks that a step may copy for each sequence: a cached tail when it is admitted, a shared block before it writes."""


def kind_of(shape: LayerShape, groups: int) -> AttentionKind:
    """Return what the tables of a layer depend on."""
    return AttentionKind(groups, shape.seen.window, shape.seen.chunk)


@dataclass(frozen=True, slots=True, eq=False)
class StepViews:
    """One step's inputs on the device, for a number of rows that it was padded to.

    Attributes:
        tokens, positions: `[1, rows] int64`; slots: `[rows] int64`; kept: `[kept] int64`.
        num_rows: `[1] int32`: rows from there on are padding.
        finite: `[rows] int32`: 1 until a key or value of the row is not finite.
        work: by kind of layer.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    kept: Tensor
    num_rows: Tensor
    finite: Tensor
    work: dict[AttentionKind, AttentionWork]


class StepBuffers:
    """Buffers for steps within some limits, over layers of some kinds."""

    def __init__(
        self, layers: Sequence[LayerShape], kinds: Sequence[AttentionKind], limits: Limits, device: torch.device
    ) -> None:
        self.limits, self.kinds, self.device = limits, tuple(kinds), device
        self.most_pairs = _COPIES * limits.sequences
        fields: list[tuple[str, int, int]] = [  # name, numbers, words of each
            ("tokens", limits.rows, 2),
            ("positions", limits.rows, 2),
            ("slots", limits.rows, 2),
            ("kept", limits.rows, 2),
            ("counts", 2 + 3 * len(self.kinds), 1),
            ("pairs", 2 * self.most_pairs, 1),
        ]
        for number, kind in enumerate(self.kinds):
            fields += [
                (f"narrow {number}", ITEM * max(limits.narrow(kind), 1), 1),
                (f"wide {number}", ITEM * max(limits.wide(kind), 1), 1),
                (f"merges {number}", MERGE * max(limits.merges(kind), 1), 1),
            ]
        fields.append(("blocks", limits.blocks, 1))
        self._places: dict[str, slice] = {}
        end = 0
        for name, count, words in fields:
            start = end + end % 2  # int64 numbers lie at even words
            end = start + count * words
            self._places[name] = slice(start, end)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(end, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._arrays: list[Any] = [host.numpy() for host in self._hosts]
        self._sent: list[Any] = [None, None]  # when each was read by the device
        self._turn = 0
        self._device = torch.zeros(end, dtype=torch.int32, device=device)
        self._finite = torch.ones(limits.rows, dtype=torch.int32, device=device)
        self._partials = self._make_partials(layers)

    def _make_partials(self, layers: Sequence[LayerShape]) -> dict[tuple[int, int], Partials]:
        """Make room for partial results, once for all layers with the same heads."""
        sizes: dict[tuple[int, int], int] = {}
        for kind in self.kinds:
            for shape in layers:
                key = (shape.heads * kind.groups, shape.value_dim)
                sizes[key] = max(sizes.get(key, 1), self.limits.partials(kind))
        return {
            (heads, dim): Partials(
                torch.zeros(slots, heads, dim, dtype=torch.float32, device=self.device),
                torch.zeros(slots, heads, dtype=torch.float32, device=self.device),
                torch.zeros(slots, heads, dtype=torch.float32, device=self.device),
            )
            for (heads, dim), slots in sizes.items()
        }

    def partials(self, settings: AttentionSettings, shape: LayerShape) -> Partials:
        """Return the room for the partial results of a layer."""
        return self._partials[settings.heads, shape.value_dim]

    def send(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        kept: Sequence[int],
        tables: StepTables,
        pairs: Sequence[tuple[int, int]] = (),
        *,
        rows: int,
    ) -> None:
        """Send a step to the device, padded with zeros to `rows` rows and to as many kept ones.

        The host's buffers are used in turn; one that the device has not read yet is waited for.
        """
        self._turn ^= 1
        if self._sent[self._turn] is not None:
            self._sent[self._turn].synchronize()
        host = self._arrays[self._turn]
        for name, values in (("tokens", tokens), ("positions", positions), ("slots", tables.slots), ("kept", kept)):
            place = host[self._places[name]].view(np.int64)
            place[: len(values)] = values
            place[len(values) : rows] = 0
        counts = [len(tables.slots), len(pairs)]
        for number, kind in enumerate(tables.kinds):
            counts += kind.counts
            for name, numbers in (("narrow", kind.narrow), ("wide", kind.wide), ("merges", kind.merges)):
                _fill(host[self._places[f"{name} {number}"]], numbers)
        host[self._places["counts"]] = counts
        _fill(host[self._places["pairs"]], array("i", [block for pair in pairs for block in pair]))
        blocks = self._places["blocks"]
        _fill(host[blocks], tables.blocks)
        end = blocks.start + len(tables.blocks)
        self._device[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
        if self.device.type == "cuda":
            self._sent[self._turn] = torch.cuda.current_stream(self.device).record_event()

    def views(self, rows: int, kept: int) -> StepViews:
        """Return the device's inputs for steps that are padded to `rows` rows and `kept` rows with logits."""
        work = {}
        counts = self._view("counts")
        blocks = self._view("blocks")
        for number, kind in enumerate(self.kinds):
            narrow, wide, merges = (self._view(f"{name} {number}") for name in ("narrow", "wide", "merges"))
            first = 2 + 3 * number
            work[kind] = AttentionWork(
                narrow.view(-1, ITEM), wide.view(-1, ITEM), merges.view(-1, MERGE), counts[first : first + 3], blocks
            )
        tokens, positions, slots, kept_rows = (
            self._view(name).view(torch.int64) for name in ("tokens", "positions", "slots", "kept")
        )
        return StepViews(
            tokens[:rows].unsqueeze(0),
            positions[:rows].unsqueeze(0),
            slots[:rows],
            kept_rows[:kept],
            counts[:1],
            self._finite[:rows],
            work,
        )

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Blocks to copy, `[most_pairs, 2] int32`, and how many there are, `[1] int32`."""
        return self._view("pairs").view(-1, 2), self._view("counts")[1:2]

    @property
    def bytes(self) -> int:
        """Device memory that the buffers take."""
        tensors = [self._device, self._finite]
        for partials in self._partials.values():
            tensors += [partials.sums, partials.peaks, partials.totals]
        return sum(tensor.nbytes for tensor in tensors)

    def _view(self, name: str) -> Tensor:
        return self._device[self._places[name]]


def _fill(place: Any, numbers: array[int]) -> None:
    place[: len(numbers)] = np.frombuffer(numbers, np.int32) if numbers else ()

"""Lay out a step for the attention kernel, as the structures that kernels.c reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.compute.cpu.kernel_calls import Part


class AttentionPlan:
    """A step in the form that the attention kernel reads, made once for all layers.

    Attributes:
        finite: `[rows] bool`, False where a layer has met a key or a value that is not finite.
    """

    def __init__(self, parts: Sequence[tuple[int, int, int, Sequence[int]]], slots: Tensor) -> None:
        """parts: for each sequence its first row, number of rows, first token and block table.

        slots: `[rows] int64`, where each row's key and value go.
        """
        self.slots = slots.contiguous()
        self.finite = torch.ones(len(slots), dtype=torch.bool)
        self.tables = torch.tensor([block for part in parts for block in part[3]], dtype=torch.int32)
        address, records = self.tables.data_ptr(), []
        for row, count, start, table in parts:
            records.append(Part(row, count, start, address, 0))
            address += 4 * len(table)
        self.parts = (Part * len(records))(*records)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def scratch(self, size: int) -> Tensor:
        """Return `[≥ size] uint8`, the same memory for all layers of a step: fresh pages cost time."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch

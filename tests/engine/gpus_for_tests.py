"""GPUs that are not there: what torch says of them, as tables of numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

GIB = 2**30


@dataclass
class FakeGpu:
    """A GPU's memory (`engine.devices.gpu.DeviceMemory`). Others hold `others` bytes, this process `kept` for reuse."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda:0"))
    size: int = 24 * GIB
    others: int = 0
    tensors: int = 0
    kept: int = 0
    highest: int = 0
    releases: int = 0

    def total(self) -> int:
        return self.size

    def free(self) -> int:
        return self.size - self.others - self.tensors - self.kept

    def allocated(self) -> int:
        return self.tensors

    def held(self) -> int:
        return self.tensors + self.kept

    def peak(self) -> int:
        return self.highest

    def forget_peak(self) -> None:
        self.highest = self.held()

    def release(self) -> None:
        self.kept, self.releases = 0, self.releases + 1

    def hold(self, count: int) -> object:
        """Take memory that a thing keeps as long as it lives; return the thing."""
        gpu = self

        class Thing:
            def __init__(self) -> None:
                gpu.tensors += count

            def __del__(self) -> None:
                gpu.tensors -= count

        return Thing()

    def take(self, count: int) -> None:
        """Allocate for a moment: from what is kept for reuse first, and everything is kept afterwards."""
        self.kept = max(self.kept, count)
        self.highest = max(self.highest, self.held())

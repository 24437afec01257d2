"""What was found out about a GPU: the checks of the kernels on it, and the rung that serves a model there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

__all__ = ["DEVICE", "GRAPH", "RUNGS", "CheckState", "GpuCheck", "GpuReport", "GpuVerdict", "Rung", "WeightKind"]

Rung = Literal["graphs", "kernels", "torch", "fallback"]
"""A way to compute a model on a GPU, the fastest first: our kernels in CUDA graphs; our kernels, launched one by one;
torch's own operations, all sequences in one pass; transformers' own forward pass, each sequence alone. The law is
promised on the first two."""

RUNGS: Final[tuple[Rung, ...]] = get_args(Rung)

CheckState = Literal["ok", "failed", "not tried"]

WeightKind = Literal["exact", "int8", "int4"]
"""How the weights of linear layers are stored, as in `engine.compute.cuda.operations.LinearWeight`."""

DEVICE: Final = "device"
"""The check that torch sees a GPU."""
GRAPH: Final = "CUDA graph"
"""The check that the kernels give the same bits in a graph as one by one."""
LINEAR: Final[dict[WeightKind, str]] = {"exact": "linear", "int8": "linear int8", "int4": "linear int4"}
"""The checks of linear layers, by kind of weight."""


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """One check of `verbatim gpu-probe`."""

    name: str
    state: CheckState
    detail: str = ""
    """What was found; of a failure: one sentence that says what is wrong and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuVerdict:
    """What `verbatim gpu-probe` found. A field is empty where it could not be found out."""

    gpu: str = ""
    """The card's name, as the driver has it."""
    capability: str = ""
    """Its compute capability: `8.9`."""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    kernels: str = ""
    """Which kernels were tried: their version, and a digest of their source."""
    checks: tuple[GpuCheck, ...] = ()
    """In the order in which they were made."""

    def check(self, name: str) -> GpuCheck:
        """Return a check by its name; one that was not tried if there is none."""
        return next((check for check in self.checks if check.name == name), GpuCheck(name, "not tried"))

    @property
    def has_gpu(self) -> bool:
        """Whether torch sees a GPU."""
        return self.check(DEVICE).state == "ok"

    @property
    def is_well(self) -> bool:
        """Whether every check is ok."""
        return _fault(self.checks) is None

    def kernels_fault(self, weights: WeightKind = "exact") -> str | None:
        """Say in one line why the kernels may not serve a model with such weights; None where they may."""
        unneeded = {GRAPH, *LINEAR.values()} - {LINEAR[weights]}
        return _fault([check for check in self.checks if check.name not in unneeded])

    def graphs_fault(self) -> str | None:
        """Say in one line why CUDA graphs of the kernels may not serve; None where they may."""
        return _fault([self.check(GRAPH)])


def _fault(checks: Sequence[GpuCheck]) -> str | None:
    """Name the first check that failed, else the first that was not tried; None if all are ok."""
    if not checks:
        return "nothing was tried"
    for state in ("failed", "not tried"):
        for check in checks:
            if check.state == state:
                return f"{check.name}: {check.detail or state}"
    return None


@dataclass(frozen=True, slots=True)
class GpuReport:
    """Which rung serves a model on a GPU, and why the rungs above it do not."""

    rung: Rung
    reasons: tuple[tuple[Rung, str], ...] = ()
    """The rungs that were passed over, the highest first, with one line each."""

    def describe(self) -> str:
        """Return one line for people: `torch (not graphs, kernels: linear: wrong numbers)`."""
        grouped: dict[str, list[str]] = {}
        for rung, reason in self.reasons:
            grouped.setdefault(reason, []).append(rung)
        told = "; ".join(f"not {', '.join(rungs)}: {reason}" for reason, rungs in grouped.items())
        return f"{self.rung} ({told})" if told else self.rung

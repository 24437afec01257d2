"""Choose how a model is computed on a GPU: the highest rung of a ladder that stands. Knows no torch, model or kernel.

    graphs    our kernels in CUDA graphs            the law is promised
    kernels   our kernels, launched one by one      the law is promised, with the same bits
    torch     torch's operations, packed            no promise
    fallback  each sequence alone                   no promise

A loader asks twice: `barred_rungs` before a weight is read, for what the entry and the checks of the card rule out, and
`descend` with a function that prepares and tests the model on one rung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from engine.errors import LoadError, NotEnoughMemory, one_line, out_of_memory
from engine.types.gpu import RUNGS, GpuReport, GpuVerdict, Rung, WeightKind

__all__ = ["Attempt", "GpuSetting", "barred_rungs", "descend"]

GpuSetting = Literal["auto", "no-graphs", "no-kernels"]
"""The key `gpu` of an entry of models.yaml."""

T = TypeVar("T")

_LAWFUL: tuple[Rung, ...] = ("graphs", "kernels")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """What came of preparing and testing a model on a rung.

    Attributes:
        result: what the loader goes on with if this rung serves.
        packed: whether the packed runner serves; if not, `result` has the fallback runner, tested.
        holds: whether the self-test found the law to hold.
        reason: why it does not, or why the runner is the fallback, in one line.
    """

    result: T
    packed: bool
    holds: bool
    reason: str = ""


def barred_rungs(setting: GpuSetting, verdict: GpuVerdict | None, weights: WeightKind = "exact") -> dict[Rung, str]:
    """Return the rungs that need not be tried, with a reason each.

    Args:
        setting: the entry's key `gpu`.
        verdict: of the checks of the card; None where they were not made, which `no-kernels` has no need of.
        weights: how the model's linear layers will be stored.
    """
    if setting == "no-kernels":
        return dict.fromkeys(_LAWFUL, "the entry says gpu: no-kernels")
    kernels = verdict.kernels_fault(weights) if verdict else "the kernels have not been tried on this card"
    if kernels is not None:
        return dict.fromkeys(_LAWFUL, kernels)
    if setting == "no-graphs":
        return {"graphs": "the entry says gpu: no-graphs"}
    graphs = verdict.graphs_fault() if verdict else None
    return {} if graphs is None else {"graphs": graphs}


def descend(
    attempt: Callable[[Rung], Attempt[T]],
    *,
    barred: Mapping[Rung, str],
    check_device: Callable[[], object] = lambda: None,
) -> tuple[T, GpuReport]:
    """Try the rungs from the highest on; return the result of the first that stands, and why those above do not.

    A rung of our kernels stands if its self-test finds the packed runner right and the law to hold. `torch` stands if
    it is packed; where its self-test has already chosen the fallback runner, that is the rung `fallback`, and nothing
    is tried again. A rung that raises is passed over, with what it raised as its reason.

    Args:
        attempt: prepares and tests the model on one rung. It starts from the model as it was read, whatever an
            earlier rung has replaced in it, and frees what an earlier rung has allocated.
        barred: from `barred_rungs`, and whatever else the loader knows (layers on several GPUs: no graphs).
        check_device: raises if the GPU can no longer be used, as `torch.cuda.synchronize` does after an illegal
            address. Called after a rung has raised: in this process all further rungs would fail, too.

    Raises:
        LoadError: no rung stands, or the GPU can no longer be used; it names the reason of each rung.
        Exception: memory ran out, as it was raised. Only graphs are given up for want of memory, since nothing else
            would make the model smaller: the rungs below need as much as `kernels`.
    """
    reasons: list[tuple[Rung, str]] = []
    for rung in RUNGS:
        if rung in barred:
            reasons.append((rung, barred[rung]))
            continue
        try:
            tried = attempt(rung)
        except Exception as error:  # whatever a kernel, a capture or an unknown architecture does
            if _short_of_memory(error) and rung != "graphs":
                raise
            reasons.append((rung, _told(error)))
            _check(check_device, reasons, error)
            continue
        stands = tried.packed and (tried.holds or rung == "torch")
        if stands:
            return tried.result, GpuReport(rung, tuple(reasons))
        if rung in ("torch", "fallback"):
            below = reasons if rung == "fallback" else [*reasons, (rung, tried.reason)]
            return tried.result, GpuReport("fallback", tuple(below))
        reasons.append((rung, tried.reason))
    raise LoadError(f"no way to compute it on this GPU works: {_listed(reasons)}.")


def _check(check_device: Callable[[], object], reasons: list[tuple[Rung, str]], error: Exception) -> None:
    try:
        check_device()
    except Exception:
        raise LoadError(
            f"the GPU cannot be used by this process any more ({_listed(reasons)}); write gpu: no-kernels into the "
            f"model's entry and start again, and report it with what `verbatim gpu-probe --json` prints."
        ) from error


def _short_of_memory(error: Exception) -> bool:
    return isinstance(error, NotEnoughMemory) or out_of_memory(error)


def _told(error: Exception) -> str:
    """Return one line about an error, with its kind where the message is not a sentence of ours."""
    said = one_line(error, 300).rstrip(".")
    if _short_of_memory(error):
        return f"memory ran out: {said}"
    kind = type(error).__name__
    return said if isinstance(error, LoadError) or said == kind else f"{kind}: {said}"


def _listed(reasons: list[tuple[Rung, str]]) -> str:
    return "; ".join(f"{rung}: {reason}" for rung, reason in reasons)

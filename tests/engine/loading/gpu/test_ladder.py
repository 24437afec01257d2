"""The ladder, with every combination of an entry, a verdict and what rungs do. No GPU, no torch."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest

from engine.errors import LoadError, NotEnoughMemory
from engine.loading.gpu.ladder import Attempt, GpuSetting, barred_rungs, descend
from engine.types.gpu import DEVICE, GRAPH, RUNGS, GpuCheck, GpuVerdict, Rung

Outcome = Literal["holds", "differs", "not packed", "raises", "no memory"]
OUTCOMES: tuple[Outcome, ...] = ("holds", "differs", "not packed", "raises", "no memory")
SETTINGS: tuple[GpuSetting, ...] = ("auto", "no-graphs", "no-kernels")

DEVICE_OK, LINEAR_OK, GRAPH_OK = (GpuCheck(name, "ok") for name in (DEVICE, "linear", GRAPH))
VERDICTS = {
    "well": GpuVerdict(checks=(DEVICE_OK, LINEAR_OK, GRAPH_OK)),
    "no graphs": GpuVerdict(checks=(DEVICE_OK, LINEAR_OK, GpuCheck(GRAPH, "failed", "other bits."))),
    "no kernels": GpuVerdict(
        checks=(DEVICE_OK, GpuCheck("linear", "failed", "wrong numbers."), GpuCheck(GRAPH, "not tried"))
    ),
    "nothing": GpuVerdict(),
}


class Rungs:
    """Stands in for a loader: each rung does what it was told."""

    def __init__(self, outcomes: dict[Rung, Outcome]) -> None:
        self.outcomes, self.tried = outcomes, list[Rung]()

    def attempt(self, rung: Rung) -> Attempt[str]:
        self.tried.append(rung)
        outcome = self.outcomes[rung]
        if outcome == "raises":
            raise RuntimeError(f"{rung} is broken\nsecond line")
        if outcome == "no memory":
            raise MemoryError(f"{rung} is too large")
        holds = outcome == "holds"
        return Attempt(f"made by {rung}", outcome != "not packed", holds, "" if holds else f"{rung} {outcome}")


def _expected(setting: GpuSetting, verdict: str, outcomes: dict[Rung, Outcome]) -> tuple[str, str]:
    """What serves in the end, and what made it: the rules again, written as a table of cases."""
    may_kernels = setting != "no-kernels" and verdict in ("well", "no graphs")
    may_graphs = may_kernels and setting == "auto" and verdict == "well"
    if may_graphs and outcomes["graphs"] == "holds":
        return "graphs", "graphs"
    if may_kernels and outcomes["kernels"] == "no memory":
        return "no memory", "kernels"
    if may_kernels and outcomes["kernels"] == "holds":
        return "kernels", "kernels"
    match outcomes["torch"]:
        case "holds" | "differs":
            return "torch", "torch"
        case "not packed":
            return "fallback", "torch"
        case "no memory":
            return "no memory", "torch"
    match outcomes["fallback"]:
        case "raises":
            return "nothing", ""
        case "no memory":
            return "no memory", "fallback"
        case _:
            return "fallback", "fallback"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_combination(setting: GpuSetting, verdict: str) -> None:
    barred = barred_rungs(setting, VERDICTS[verdict])
    for graphs, kernels, torch in itertools.product(OUTCOMES, repeat=3):
        for fallback in ("not packed", "raises", "no memory"):
            outcomes: dict[Rung, Outcome] = dict(zip(RUNGS, (graphs, kernels, torch, fallback), strict=True))  # type: ignore[arg-type]
            rungs = Rungs(outcomes)
            serves, maker = _expected(setting, verdict, outcomes)
            if serves == "no memory":
                with pytest.raises(MemoryError, match=f"{maker} is too large"):
                    descend(rungs.attempt, barred=barred)
            elif serves == "nothing":
                with pytest.raises(LoadError, match="no way to compute it") as raised:
                    descend(rungs.attempt, barred=barred)
                assert all(f"{rung}: " in raised.value.message for rung in RUNGS)
            else:
                result, report = descend(rungs.attempt, barred=barred)
                assert (report.rung, result) == (serves, f"made by {maker}")
                assert [rung for rung, _ in report.reasons] == list(RUNGS[: RUNGS.index(report.rung)])
                assert all(reason and "\n" not in reason for _, reason in report.reasons)
            assert not set(rungs.tried) & barred.keys()
            assert len(set(rungs.tried)) == len(rungs.tried)


@pytest.mark.parametrize(
    ("setting", "verdict", "graphs", "kernels"),
    [
        ("auto", "well", None, None),
        ("auto", "no graphs", "CUDA graph: other bits.", None),
        ("auto", "no kernels", "linear: wrong numbers.", "linear: wrong numbers."),
        ("auto", "nothing", "nothing was tried", "nothing was tried"),
        ("no-graphs", "well", "the entry says gpu: no-graphs", None),
        ("no-graphs", "no graphs", "the entry says gpu: no-graphs", None),
        ("no-graphs", "no kernels", "linear: wrong numbers.", "linear: wrong numbers."),
        ("no-kernels", "well", "the entry says gpu: no-kernels", "the entry says gpu: no-kernels"),
    ],
)
def test_what_is_barred_says_why(setting: GpuSetting, verdict: str, graphs: str | None, kernels: str | None) -> None:
    barred = barred_rungs(setting, VERDICTS[verdict])
    assert (barred.get("graphs"), barred.get("kernels")) == (graphs, kernels)
    assert not {"torch", "fallback"} & barred.keys()


def test_a_kind_of_weight_that_fails_bars_only_models_that_have_it() -> None:
    bad = GpuCheck("linear int4", "failed", "wrong numbers.")
    verdict = GpuVerdict(checks=(DEVICE_OK, LINEAR_OK, GRAPH_OK, GpuCheck("linear int8", "ok"), bad))
    assert barred_rungs("auto", verdict) == barred_rungs("auto", verdict, "int8") == {}
    assert barred_rungs("auto", verdict, "int4")["kernels"] == "linear int4: wrong numbers."
    assert not verdict.is_well


def test_without_checks_no_kernel_is_tried() -> None:
    assert set(barred_rungs("auto", None)) == set(barred_rungs("no-graphs", None)) == {"graphs", "kernels"}
    assert "no-kernels" in barred_rungs("no-kernels", None)["kernels"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("CUDA error: operation not permitted\nmore"),
            "RuntimeError: CUDA error: operation not permitted more",
        ),
        (LoadError("it is another model."), "it is another model"),
        (ValueError(), "ValueError"),
        (MemoryError("2 GiB"), "memory ran out: 2 GiB"),
    ],
)
def test_a_reason_is_one_line(error: Exception, reason: str) -> None:
    def attempt(rung: Rung) -> Attempt[str]:
        if rung == "graphs":
            raise error
        return Attempt("", True, True)

    assert descend(attempt, barred={})[1].reasons == (("graphs", reason),)


def test_too_little_memory_for_the_model_is_not_passed_over() -> None:
    """Placement's own error, which says how much is needed and free, reaches the user as it is."""

    def attempt(rung: Rung) -> Attempt[str]:
        raise NotEnoughMemory("the weights need 9 GiB, 8 GiB are free.", needed=9, free=8)

    with pytest.raises(NotEnoughMemory, match="9 GiB"):
        descend(attempt, barred={"graphs": "no"})


def test_a_broken_context_ends_the_descent() -> None:
    """After an illegal address every call of CUDA fails: that is said once, and not blamed on torch."""
    rungs = Rungs(dict.fromkeys(RUNGS, "raises"))

    def check() -> None:
        if "kernels" in rungs.tried:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(LoadError, match="gpu: no-kernels") as raised:
        descend(rungs.attempt, barred={}, check_device=check)
    assert rungs.tried == ["graphs", "kernels"]
    assert "kernels is broken" in raised.value.message


def test_an_interrupt_is_not_a_reason() -> None:
    def attempt(rung: Rung) -> Attempt[str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        descend(attempt, barred={})

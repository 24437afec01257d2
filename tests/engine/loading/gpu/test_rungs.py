"""A model on each rung of the ladder: by the reference of the kernels, on a CPU, and with kernels that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_stand_in import StandInRecorder
from on_reference import ReferenceBackend
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from engine.compute.backend import Backend, StepSize
from engine.compute.cuda.backend import CudaBackend
from engine.compute.cuda.modules import RowLinear
from engine.compute.cuda.steps.graphs import NotCapturable
from engine.compute.torch_backend import TorchBackend
from engine.errors import LoadError
from engine.loading.gpu import probe, rungs
from engine.loading.gpu.rungs import Rungs, choose_rung, served
from engine.loading.selftest import Reference, SelfTest, self_test
from engine.types.gpu import GpuReport, GpuVerdict

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card on which every check has passed."""
    monkeypatch.setattr(rungs, "barred_rungs", lambda setting, verdict, weights: _BARRED[setting])
    monkeypatch.setattr(probe, "verdict_of", lambda device, say: GpuVerdict())


_BARRED: Any = {
    "auto": {},
    "no-graphs": {"graphs": "the entry says gpu: no-graphs"},
    "no-kernels": dict.fromkeys(("graphs", "kernels"), "the entry says gpu: no-kernels"),
}


def rungs_of(model: Any, make_kernels: Callable[[], CudaBackend]) -> Rungs:
    reference = Reference.of(model, 448, 512)

    def test(backend: Backend) -> SelfTest:
        return self_test(model, backend, reference, 448, torch.float32, 512)

    return Rungs(
        model=model,
        device=CPU,
        make_kernels=make_kernels,
        test=test,
        size=StepSize(16, 4, 512),
        vocab_size=448,
        stored=torch.float32,
        length=512,
        weights="exact",
        say=lambda _: None,
    )


class Broken(ReferenceBackend):
    """A backend whose products are wrong in one way."""

    def __init__(self, change: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__(**options)
        inner: Any = self._operations
        real = inner.linear

        def linear(x: Tensor, weight: Any, out_dtype: torch.dtype) -> Tensor:
            found: Tensor = change(real(x, weight, out_dtype))
            return found

        inner.linear = linear


def wrong(out: Tensor) -> Tensor:
    return out * 1.5


def depends_on_rows(out: Tensor) -> Tensor:
    return out * (1 + 1e-6 * out.shape[0])


def fails(out: Tensor) -> Tensor:
    raise RuntimeError("an illegal memory access was encountered")


def test_a_card_that_is_well_serves_in_graphs(model: nn.Module) -> None:
    backend, found, report = choose_rung(rungs_of(model, lambda: ReferenceBackend(records=True)), "auto")
    assert report == GpuReport("graphs")
    assert isinstance(backend, CudaBackend)
    assert (found.report.holds, backend.no_graphs) == (True, None)
    assert served(report, backend) == report
    assert any(isinstance(module, RowLinear) for module in model.modules())


def test_a_model_that_sums_over_rows_is_left_to_torch(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, given, out: out + 0 * out.sum())
    _, _, report = choose_rung(rungs_of(model, lambda: ReferenceBackend(records=True)), "auto")
    assert report.rung == "torch"
    assert dict(report.reasons)["graphs"].startswith("no trial found other bits, but LlamaForCausalLM computes sum")


def test_what_cannot_be_recorded_is_launched_step_by_step(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(recorder: StandInRecorder, run: Callable[[], Tensor]) -> Any:
        raise NotCapturable("operation not permitted when stream is capturing")

    monkeypatch.setattr(StandInRecorder, "record", refuses)
    backend, found, report = choose_rung(rungs_of(model, lambda: ReferenceBackend(records=True)), "auto")
    assert report == GpuReport("kernels", (("graphs", "operation not permitted when stream is capturing"),))
    assert found.report.holds
    assert isinstance(backend, CudaBackend)
    assert not backend.uses_graphs


def test_the_entry_may_do_without_graphs_or_kernels(model: nn.Module) -> None:
    backend, _, report = choose_rung(rungs_of(model, lambda: ReferenceBackend(records=True)), "no-graphs")
    assert report == GpuReport("kernels", (("graphs", "the entry says gpu: no-graphs"),))
    assert isinstance(backend, CudaBackend)
    assert not backend.uses_graphs


def test_without_kernels_the_model_is_as_it_was_read(model: nn.Module) -> None:
    def never() -> CudaBackend:
        raise AssertionError

    backend, _, report = choose_rung(rungs_of(model, never), "no-kernels")
    assert (report.rung, type(backend), backend.linear) == ("torch", TorchBackend, "torch")
    assert not any(isinstance(module, RowLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wrong, "differs from plain transformers"),
        (depends_on_rows, "bits differ"),
        (fails, "an illegal memory access"),
    ],
)
def test_kernels_that_are_wrong_serve_nobody(
    change: Callable[[Tensor], Tensor], words: str, model: Any, tiny: Callable[[str], Path]
) -> None:
    backend, _, report = choose_rung(rungs_of(model, lambda: Broken(change, records=True)), "auto")
    assert (report.rung, type(backend)) == ("torch", TorchBackend)
    assert all(words in reason for _, reason in report.reasons), report
    plain = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    mine, right = model.state_dict(), plain.state_dict()
    assert mine.keys() == right.keys()
    assert all(torch.equal(mine[name], right[name]) for name in right), "the model has its own weights back"
    assert not any(isinstance(module, RowLinear) for module in model.modules())


def test_a_gpu_that_is_lost_is_said(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal address every later call of this process fails: nothing is tried any more."""
    chosen = rungs_of(model, lambda: Broken(fails))
    chosen.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fails(torch.zeros(1)))
    with pytest.raises(LoadError, match=r"cannot be used by this process any more .* write gpu: no-kernels"):
        choose_rung(chosen, "auto")


def test_graphs_that_fail_over_the_cache_that_serves_are_told(model: nn.Module) -> None:
    backend = ReferenceBackend(records=True)
    backend.no_graphs = "no memory is left"
    told = served(GpuReport("graphs"), backend)
    assert told == GpuReport("kernels", (("graphs", "no memory is left"),))
    assert served(None, backend) is None

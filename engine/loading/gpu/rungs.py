"""Prepare and test a model on each rung of the ladder, from the model as it was read. Decides nothing itself.

The two rungs of our kernels share one preparation: in graphs and one by one the same modules compute. Whatever a rung
has replaced in the model is taken back before a lower one is tried.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from engine.compute.backend import Backend, Progress, StepSize
from engine.compute.cuda.backend import CudaBackend
from engine.compute.cuda.steps.graphs import CudaRecorder
from engine.compute.torch_backend import TorchBackend
from engine.devices.gpu import wait_for
from engine.errors import LoadError
from engine.loading.gpu import probe
from engine.loading.gpu.ladder import Attempt, GpuSetting, barred_rungs, descend
from engine.loading.gpu.surroundings import triton_folder
from engine.loading.selftest import SelfTest
from engine.types.gpu import GpuReport, Rung, WeightKind

__all__ = ["Rungs", "choose_rung", "kernels_of", "served"]

log = logging.getLogger("verbatim.engine")

Test = Callable[[Backend], SelfTest]
"""Tests the model, as it is now, with a backend."""

_TRIAL_BLOCKS = 64
"""Of the cache over which graphs are tried."""


@dataclass(slots=True)
class Rungs:
    """A model, and the ways to compute it on one GPU.

    Attributes:
        model: as it was read.
        make_kernels: makes the backend of our kernels.
        test: the self-test.
        size: of the steps that will be served.
        vocab_size: rows of the output layer; stored: the checkpoint's dtype; length: tokens of a sequence.
        weights: how most linear layers are stored.
        say: told what takes long.
    """

    model: nn.Module
    device: torch.device
    make_kernels: Callable[[], CudaBackend]
    test: Test
    size: StepSize
    vocab_size: int
    stored: torch.dtype
    length: int
    weights: WeightKind
    say: Progress
    _own: str = "eager"
    _kernels: CudaBackend | None = None
    _found: SelfTest | Exception | None = None  # by the self-test of the kernels

    def __post_init__(self) -> None:
        self._own = getattr(self.model.config, "_attn_implementation", None) or "eager"

    def attempt(self, rung: Rung) -> Attempt[tuple[Backend, SelfTest]]:
        """Prepare and test the model on a rung: see `engine.loading.gpu.ladder.descend`."""
        if rung not in ("graphs", "kernels"):
            self._take_back()
            backend: Backend = TorchBackend(
                self.device, f"torch {self.weights}" if self.weights != "exact" else "torch"
            )
            return _attempt(backend, self._tested(backend))
        kernels, found = self._with_kernels()
        kernels.uses_graphs = rung == "graphs"
        if kernels.uses_graphs and found.layers is not None and found.report.holds:
            self._try_graphs(kernels, found)
        return _attempt(kernels, found)

    def _with_kernels(self) -> tuple[CudaBackend, SelfTest]:
        """Return the backend of our kernels and what the self-test found with it; it is made and tested once."""
        if self._kernels is None:
            self._kernels = self.make_kernels()
            try:
                self._found = self._tested(self._kernels)
            except Exception as error:  # kept, so that the next rung does not begin again
                self._found = error
        assert self._found is not None
        if isinstance(self._found, Exception):
            raise self._found
        return self._kernels, self._found

    def _tested(self, backend: Backend) -> SelfTest:
        backend.fuse(self.model, stored=self.stored, length=self.length, progress=self.say)
        self.say("self-test")
        return self.test(backend)

    def _try_graphs(self, kernels: CudaBackend, found: SelfTest) -> None:
        """Record all sizes of step over a small cache, and compare what they replay. Nothing is kept."""
        assert found.layers is not None
        self.say("recording steps as graphs")
        cache = kernels.allocate(found.layers, _TRIAL_BLOCKS)
        kernels.runner(
            self.model, cache, self.vocab_size, self.size, skips_masks=found.skips_masks, serves=True
        )  # fmt: skip
        if kernels.no_graphs is not None:
            raise LoadError(kernels.no_graphs)

    def _take_back(self) -> None:
        """Give the model its own modules and attention back."""
        if self._kernels is not None:
            self._kernels.restore()
            self._kernels = self._found = None
        with contextlib.suppress(Exception):  # the self-test says that it cannot be served
            self.model.set_attn_implementation(self._own)  # type: ignore[operator]


def _attempt(backend: Backend, found: SelfTest) -> Attempt[tuple[Backend, SelfTest]]:
    law = found.report
    return Attempt((backend, found), found.layers is not None, law.holds, "" if law.holds else law.reason)


def choose_rung(rungs: Rungs, setting: GpuSetting) -> tuple[Backend, SelfTest, GpuReport]:
    """Find out how a model is served on its GPU. `setting`: the entry's key `gpu`.

    Raises: as `descend`.
    """
    verdict = None if setting == "no-kernels" else probe.verdict_of(str(rungs.device), rungs.say)
    barred = barred_rungs(setting, verdict, rungs.weights)
    check = (lambda: wait_for(rungs.device)) if rungs.device.type == "cuda" else (lambda: None)
    (backend, found), report = descend(rungs.attempt, barred=barred, check_device=check)
    return backend, found, report


def served(report: GpuReport | None, backend: Backend) -> GpuReport | None:
    """Correct a report by what became of the graphs of the runner that serves: they are recorded over its own cache."""
    if report is None or report.rung != "graphs" or not isinstance(backend, CudaBackend) or backend.no_graphs is None:
        return report
    return GpuReport("kernels", (*report.reasons, ("graphs", backend.no_graphs)))


def kernels_of(device: torch.device) -> CudaBackend:
    """Make the backend of our kernels. Triton compiles them when they are first used, and keeps them in its folder."""
    folder = triton_folder()
    if folder is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder))
    from engine.compute.cuda.triton_operations import TritonOperations  # only a CUDA build of torch brings triton

    return CudaBackend(device, TritonOperations(), lambda: CudaRecorder(device))

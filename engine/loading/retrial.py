"""Try a model again that has passed every trial in an earlier start: one pass must give the very bits of that start.

The trials compare bits under many circumstances, and numbers with plain transformers. Whoever has the bits of a start
that passed them, with the same files, code, libraries, kernels, processor and settings, has their result. So a later
start computes the same texts once, in pieces among each other, as that start did not, and compares. If a single bit
differs, it makes all the trials. Decision 0046 says what has to be the same.
"""

from __future__ import annotations

import json
import os
import platform
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.compute.backend import Backend
from engine.compute.discovery import input_device
from engine.compute.processor import processor_target
from engine.config import ModelConfig
from engine.errors import out_of_memory
from engine.loading.kept.weights import KeptWeights
from engine.loading.selftest import Extent, SelfTest, packed_of, texts_of
from engine.types.fingerprint_parts import digest_of
from engine.types.model_info import ReproducibilityReport

__all__ = ["NotAsBefore", "Retrial"]

Value = Tensor | str | int | float | bool | None

_VARIABLES: Final = (
    *("ATEN_", "BLIS_", "DNNL_", "GLIBC_", "GOMP_", "KMP_", "LD_", "MALLOC_", "MKL_", "NPY_", "OMP_", "ONEDNN_"),
    *("OPENBLAS_", "PYTORCH_", "TORCH", "VERBATIM_"),
)
"""How the names of variables begin that libraries which compute are told things by."""


class NotAsBefore(Exception):
    """The model does not compute what it did when it passed the trials."""


class Retrial:
    """One load's part of the self-test that an earlier start can stand for.

    Attributes:
        known: what that start has left; None: every trial has to be made.
    """

    def __init__(
        self, config: ModelConfig, kept: KeptWeights, model: nn.Module, vocab_size: int, length: int, *, fresh: bool
    ) -> None:
        """fresh: use nothing of an earlier start. Entries with adapters use nothing either: those are tried, too."""
        self._kept, self._model, self._vocab_size, self._length = kept, model, vocab_size, length
        self._name = f"self-test {digest_of(_circumstances(config, vocab_size, length))}"
        self.known: dict[str, Any] | None = None if fresh or config.adapters else kept.known(self._name)

    def note(self, test: SelfTest, backend: Backend) -> None:
        """Leave for a later start what a model computed that has passed every trial."""
        if test.layers is None or not test.report.holds or not test.crowd:
            return
        record: dict[str, Value] = {
            "computed": _computed(self._model, backend),
            "reason": test.report.reason,
            "checks": json.dumps(test.report.checks),
            "single_rows": test.single_rows,
            "row_safe": test.row_safe,
            "skips_masks": test.skips_masks,
            **{f"text {number}": logits for number, logits in enumerate(test.crowd)},
        }
        self._kept.note(self._name, record)

    def passed(self, backend: Backend) -> SelfTest:
        """Compute the texts, and return the test that they passed.

        Raises:
            NotAsBefore: anything is not as it was. What was kept is removed.
        """
        test = self._again(backend)
        if test is None:
            self._kept.forget()
            raise NotAsBefore
        return test

    @torch.inference_mode()
    def _again(self, backend: Backend) -> SelfTest | None:
        known, model = self.known, self._model
        if known is None or known["computed"] != _computed(model, backend):
            return None
        extent = Extent.on(input_device(model))
        texts = texts_of(model, self._vocab_size, self._length, extent)
        try:
            _, packed = packed_of(model, backend, self._vocab_size, self._length)
            runs = packed.run(texts, budget=extent.chunk, far=True)
        except Exception as error:  # the trials will say what it is
            if out_of_memory(error):
                raise
            return None
        if (packed.row_safe, packed.skips_masks) != (known["row_safe"], known["skips_masks"]):
            return None
        crowd = tuple(run.logits for run in runs)
        if not all(torch.equal(logits, known[f"text {number}"]) for number, logits in enumerate(crowd)):
            return None
        checks = tuple((str(name), bool(right)) for name, right in json.loads(known["checks"]))
        report = ReproducibilityReport(True, known["reason"], checks)
        return SelfTest(packed.layers, report, known["single_rows"], packed.row_safe, packed.skips_masks, crowd=crowd)


def _circumstances(config: ModelConfig, vocab_size: int, length: int) -> dict[str, Any]:
    """Name what the trials depend on beside what the kept weights do, which name the file."""
    variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    return {
        "entry": config.model_dump(mode="json"),
        "sizes": [vocab_size, length],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "torch": [
            torch.__config__.show(),
            torch.backends.cpu.get_cpu_capability(),
            torch.get_float32_matmul_precision(),
        ],
        "processor": processor_target(),
        "system": [platform.platform(), platform.python_version(), *platform.libc_ver()],
        "variables": digest_of(variables),
    }


def _computed(model: nn.Module, backend: Backend) -> str:
    return str(digest_of([type(model).__name__, dict(backend.describe())]))

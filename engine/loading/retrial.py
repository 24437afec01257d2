"""Try a model again that has passed every trial in an earlier start: one pass must give the very bits of that start.

The trials compare bits under many circumstances, and numbers with plain transformers. Whoever has the bits of a start
that passed them, with the same files, code, libraries, kernels and processor, has their result. So a later start
computes the texts together once, and compares. If a single bit differs, it makes all the trials.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.compute.backend import Backend
from engine.compute.discovery import input_device
from engine.errors import out_of_memory
from engine.loading.selftest import Extent, SelfTest, packed_of, texts_of
from engine.types.fingerprint_parts import digest_of
from engine.types.model_info import ReproducibilityReport

__all__ = ["name_for", "passed_again", "record_of"]

Value = Tensor | str | int | float | bool | None


def name_for(vocab_size: int, length: int) -> str:
    """Name the record for this process: trials depend on more than kept weights do. No layer has such a name."""
    libc, vectors = platform.libc_ver(), torch.backends.cpu.get_cpu_capability()
    values = (vocab_size, length, torch.get_num_threads(), vectors, platform.python_version(), libc)
    return f" self-test {digest_of(values)}"


def record_of(test: SelfTest, model: nn.Module, backend: Backend) -> dict[str, Value] | None:
    """Return what a later start needs; None if not every trial passed."""
    if test.layers is None or not test.report.holds or not test.crowd:
        return None
    return {
        "circumstances": _circumstances(model, backend),
        "reason": test.report.reason,
        "checks": json.dumps(test.report.checks),
        "single_rows": test.single_rows,
        "row_safe": test.row_safe,
        "skips_masks": test.skips_masks,
        **{f"text {number}": logits for number, logits in enumerate(test.crowd)},
    }


@torch.inference_mode()
def passed_again(
    known: Mapping[str, Any], model: nn.Module, backend: Backend, vocab_size: int, length: int
) -> SelfTest | None:
    """Compute the texts, and return the test that they passed; None if anything is not as it was."""
    if known["circumstances"] != _circumstances(model, backend):
        return None
    texts = texts_of(model, vocab_size, length, Extent.on(input_device(model)))
    try:
        _, packed = packed_of(model, backend, vocab_size, length)
        runs = packed.run(texts, far=True)
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


def _circumstances(model: nn.Module, backend: Backend) -> str:
    return str(digest_of([type(model).__name__, dict(backend.describe())]))

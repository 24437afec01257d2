"""The CUDA backend: computes with operations that treat every row by itself, in graphs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Final

import torch
from torch import nn

from engine.compute.attention import IMPLEMENTATION, register_attention
from engine.compute.backend import PackedChunk, Progress, StepSize
from engine.compute.cuda import tiles
from engine.compute.cuda.modules import Replaced, RowLinear, replace_modules
from engine.compute.cuda.operations import Operations
from engine.compute.cuda.row_operations import doubtful_operations
from engine.compute.cuda.runner import CudaPlan, CudaRunner, plan_once
from engine.compute.cuda.steps.graphs import Recorder
from engine.compute.kv_cache import KVCache, LayerShape
from engine.compute.torch_backend import hardware
from engine.devices.gpu import release_cache
from engine.errors import first_line, out_of_memory
from engine.host_memory import give_back_memory

__all__ = ["CudaBackend"]

log = logging.getLogger("verbatim.engine")

_SETTINGS: Final = (
    *("DISABLE_MMA_V3", "DISABLE_MMA_V5", "DISABLE_PTXAS_OPT", "TRITON_DEFAULT_FP_FUSION", "TRITON_F32_DEFAULT"),
    *("TRITON_INTERPRET", "TRITON_OVERRIDE_ARCH", "TRITON_PTXAS_PATH"),
)
"""Variables by which Triton compiles other code from the same kernels."""


class CudaBackend:
    """Computes on one device (see `engine.compute.backend.Backend`)."""

    QUANTIZATIONS: ClassVar[frozenset[str]] = frozenset({"int8", "int4"})
    """Of weights, which are rounded before the model is compared with plain transformers."""

    def __init__(
        self,
        device: torch.device,
        operations: Operations,
        make_recorder: Callable[[], Recorder] | None = None,
        most_recorded: int | None = None,
    ) -> None:
        """Compute on a device.

        Args:
            operations: the kernels.
            make_recorder: makes what records a runner's graphs; None: every step is launched anew.
            most_recorded: rows of the largest step that is recorded; None: all sizes are.
        """
        self.device, self._operations = device, operations
        self._make_recorder, self._most_recorded = make_recorder, most_recorded
        self.uses_graphs = make_recorder is not None
        """Whether steps that serve are recorded."""
        self.no_graphs: str | None = None if make_recorder is not None else "not asked for"
        """Why steps are not recorded as graphs; None if they are, or will be."""
        self.linear = "triton"
        self._replaced: Replaced | None = None
        self._doubt: str | None = None

    @property
    def breaks_law(self) -> str | None:
        """Name what the model computes beside the kernels that may depend on the number of rows.

        Each number of a kernel's result has a chain of operations of its own; so have torch's element-wise ones.
        """
        return self._doubt

    @property
    def exact_linear(self) -> None:
        """None: no adapter is computed beside a model on a GPU."""

    def allocate(self, layers: Sequence[LayerShape], num_blocks: int) -> KVCache:
        """Allocate a cache of plain layout."""
        return KVCache(layers, num_blocks)

    def plan(self, cache: KVCache, chunks: Sequence[PackedChunk]) -> CudaPlan:
        """Plan a single step, with buffers of its own."""
        return plan_once(self._operations, cache, chunks)

    def runner(
        self,
        model: nn.Module,
        cache: KVCache,
        vocab_size: int,
        size: StepSize,
        *,
        single_rows: bool = False,
        row_safe: bool = False,
        skips_masks: bool = False,
        bystanders: Sequence[int] = (),
        serves: bool = False,
    ) -> CudaRunner:
        """Compute steps whose inputs stand in fixed memory; where it serves, as graphs."""
        runner = CudaRunner(
            model, self, self._operations, cache, vocab_size, size, skips_masks=skips_masks, bystanders=bystanders
        )
        if serves:
            runner.warm()
        if serves and self.uses_graphs and self._make_recorder is not None:
            self.no_graphs = runner.record(self._make_recorder(), self._most_recorded)
            if self.no_graphs is not None:
                log.warning("steps are launched one by one, not as graphs: %s", self.no_graphs)
        return runner

    def fuse(self, model: nn.Module, *, stored: torch.dtype, length: int, progress: Progress) -> None:
        """Replace linear layers, norms and gated feed-forward parts."""
        self._replaced = replace_modules(model, self._operations, progress)
        kinds = {module.packed.kind for module in model.modules() if isinstance(module, RowLinear)} - {"exact"}
        self.linear = " ".join(["triton", *sorted(kinds)])
        told = ", ".join(f"{count} {kind}" for kind, count in self._replaced.counts.items())
        progress(f"replaced by kernels: {told or 'nothing'}")
        self._doubt = _doubt(model)

    def restore(self) -> None:
        """Give the model that was fused its own modules back."""
        if self._replaced is not None:
            self._replaced.undo()

    def release_memory(self) -> None:
        """Give freed memory back to the device and the operating system."""
        if self.device.type == "cuda":
            release_cache()
        give_back_memory()

    def describe(self) -> Mapping[str, str]:
        """Return the kind of linear layers, the table of their tiles, which modules are ours, and the hardware.

        And what is set in the environment that changes the code which Triton compiles.
        """
        counts = self._replaced.counts if self._replaced is not None else {}
        return {
            "linear": self.linear,
            "tiles": tiles.digest(),
            "modules": " ".join(f"{kind} {count}" for kind, count in sorted(counts.items())),
            "triton_settings": " ".join(f"{name}={os.environ[name]}" for name in _SETTINGS if os.environ.get(name)),
            **hardware(self.device),
        }


def _doubt(model: nn.Module) -> str | None:
    """Say which of a model's operations may depend on the number of rows; None if none is known to."""
    register_attention()
    own = getattr(model.config, "_attn_implementation", None) or "eager"
    try:
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        found = doubtful_operations(model)
    except Exception as error:  # an architecture that is called in another way; the self-test says why
        if out_of_memory(error):
            raise
        return f"it was not seen what {type(model).__name__} computes: {first_line(error)}"
    finally:
        with contextlib.suppress(Exception):
            model.set_attn_implementation(own)  # type: ignore[operator]
    if not found:
        return None
    return f"{type(model).__name__} computes {', '.join(found)} by torch, which may depend on the number of rows"

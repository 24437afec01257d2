"""The packed runner over layers that may be one call, and the way back to layers one by one. Knows no kernel."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from engine.compute.backend import StepPlan
from engine.compute.cpu.attention import CpuPlan
from engine.compute.cpu.layers.decoder_layer import part_layers
from engine.compute.cpu.layers.stack import Apart, ended
from engine.compute.cpu.layers.straight import read_forward
from engine.compute.model_runner import PackedRunner

log = logging.getLogger("verbatim.engine")


class StackRunner(PackedRunner):
    """Computes steps; one in which a model does something between layers is computed again, layer by layer.

    A model that does nothing but call its parts is not called itself (`engine.compute.cpu.layers.straight`), but in
    steps with rows of adapters: only its modules know those.
    """

    def __init__(self, *given: Any, **trial: Any) -> None:
        """Take what `PackedRunner` takes."""
        super().__init__(*given, **trial)
        self._straight = read_forward(self._model.model, **self._keywords) if self._model.keeps else None

    def _logits(self, plan: StepPlan, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        straight = self._straight
        if straight is None or not straight.holds or not isinstance(plan, CpuPlan):
            return super()._logits(plan, tokens, positions, rows)
        if plan.adapter_rows or not plan.cache.all_native:
            return super()._logits(plan, tokens, positions, rows)
        return straight(plan, tokens, positions, rows)

    def _run(self, tokens: list[int], positions: list[int], rows: list[int], plan: StepPlan) -> Tensor:
        if not isinstance(plan, CpuPlan):
            return super()._run(tokens, positions, rows, plan)
        try:
            logits = super()._run(tokens, positions, rows, plan)
            ended(plan)
        except Apart as error:
            log.warning("decoder layers are called one by one from now on: %s", error)
            part_layers(self._model.model)
            self._straight = None
            plan.begin_again()
            logits = super()._run(tokens, positions, rows, plan)
        return logits

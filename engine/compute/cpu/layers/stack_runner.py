"""The packed runner over layers that may be one call, and the way back to layers one by one. Knows no kernel."""

from __future__ import annotations

import logging

from torch import Tensor

from engine.compute.backend import StepPlan
from engine.compute.cpu.attention import CpuPlan
from engine.compute.cpu.layers.decoder_layer import part_layers
from engine.compute.cpu.layers.stack import Apart, ended
from engine.compute.model_runner import PackedRunner

log = logging.getLogger("verbatim.engine")


class StackRunner(PackedRunner):
    """Computes steps; one in which a model does something between layers is computed again, layer by layer."""

    def _run(self, tokens: list[int], positions: list[int], rows: list[int], plan: StepPlan) -> Tensor:
        if not isinstance(plan, CpuPlan):
            return super()._run(tokens, positions, rows, plan)
        try:
            logits = super()._run(tokens, positions, rows, plan)
            ended(plan)
        except Apart as error:
            log.warning("decoder layers are called one by one from now on: %s", error)
            part_layers(self._model.model)
            plan.begin_again()
            logits = super()._run(tokens, positions, rows, plan)
        return logits

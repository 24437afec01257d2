"""Decoder layers that follow one another, as one kernel call. Knows no model by name.

What Python does between two layers (modules, hooks, arguments) takes a tenth of a small model's decode step. So the
first of such layers computes them all and returns what the last would; each of the others returns what it is given.

That is right only if a model gives each layer the very tensor that the one before returned, and all of them the same
angles, and uses no layer's result otherwise. A watched pass shows the first (`runs_of_layers`), the model's own result
the last. In a step, whatever can be seen of a model that does otherwise raises `Apart`: the layers are then called one
by one (`engine.compute.cpu.layers.stack_runner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.compute.cpu.layers.layer_kernel import LayerKernel, LayerStack

if TYPE_CHECKING:
    from engine.compute.cpu.attention import CpuPlan
    from engine.compute.cpu.layers.layer_reading import Watched

__all__ = ["Apart", "Computed", "Stack", "ended", "runs_of_layers"]


class Apart(Exception):
    """A model does something between layers that were computed as one; the message says where."""


@dataclass(slots=True, eq=False)
class Computed:
    """What the first layer of a stack has computed in a step.

    Attributes:
        result: `[1, T, dim]`, of the last layer, computed with these cos and sin; copy: of it.
        due: numbers of the layers that are still to be called, the next one first.
    """

    stack: Stack
    result: Tensor
    copy: Tensor
    angles: tuple[Tensor, Tensor]
    due: list[int]


class Stack:
    """Consecutive decoder layers."""

    def __init__(self, numbers: Sequence[int], kernels: Sequence[LayerKernel]) -> None:
        """numbers: of the layers, in the cache, in order, two or more; kernels: theirs."""
        self._numbers = tuple(numbers)
        self._kernel = LayerStack(kernels)

    def compute(self, plan: CpuPlan, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Compute all layers. x, angles: as in `__call__`. Returns `[1, T, dim]`."""
        keys, values = ([part[n] for n in self._numbers] for part in (plan.cache.keys, plan.cache.values))
        cos, sin = angles
        y: Tensor = self._kernel(plan.kernel_plan, x[0], cos[0], sin[0], keys, values).unsqueeze(0)
        return y

    def __call__(self, number: int, plan: CpuPlan, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Compute all layers if `number` is the first one's; else return x.

        Args:
            x: `[1, T, dim] float32`; angles: cos and sin, `[1, T, angles] float32`.

        Raises:
            Apart: it is not this layer's turn, or it got something else than the one before it gave.
        """
        if number == self._numbers[0]:
            ended(plan)
            y = self.compute(plan, x, angles)
            plan.computed = Computed(self, y, y.clone(), angles, list(self._numbers[1:]))
            return y
        done: Computed | None = plan.computed
        if done is None or done.stack is not self or done.due[:1] != [number]:
            raise Apart(f"layer {number} is called out of turn")
        if done.result is not x or not _same(done.angles, angles):
            raise Apart(f"layer {number} got something else than the layer before it gave")
        done.due.pop(0)
        # Bits, not numbers: a row that is not finite hurts nobody else. What comes after the last layer is free.
        if not done.due and not torch.equal(x.view(torch.int32), done.copy.view(torch.int32)):
            raise Apart(f"what a layer before layer {number} gave was changed in place")
        return x


def ended(plan: CpuPlan) -> None:
    """Check that no layer of a stack is left out. Raises Apart."""
    done: Computed | None = plan.computed
    if done is not None and done.due:
        raise Apart(f"layer {done.due[0]} is left out")


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(a is b for a, b in zip(one, other, strict=True))


def runs_of_layers(kernels: Sequence[LayerKernel | None], watched: Sequence[Watched]) -> list[list[int]]:
    """Return the numbers of layers that can be one stack each, two or more.

    Args:
        kernels: of the layers, in order; None: it is not computed by a kernel alone.
        watched: what each did in the watched pass.
    """
    runs: list[list[int]] = []
    for number, kernel in enumerate(kernels):
        if kernel is None:
            continue
        run = runs[-1] if runs and runs[-1][-1] == number - 1 else []
        joined = [k for k in (kernels[n] for n in run) if k is not None] + [kernel]
        if run and watched[number].follows(watched[number - 1]) and LayerStack.fit(joined):
            run.append(number)
        else:
            runs.append([number])
    return [run for run in runs if len(run) > 1]

"""Decoder layers that follow one another, as one kernel call. Knows no model by name.

What Python does between two layers (modules, hooks, arguments) takes an eighth of a small model's decode step. So the
first of such layers computes them all and returns what the last would; each of the others returns what it is given.
That is right only if a model gives each layer the very tensor that the one before returned, and all of them the same
angles: a watched pass shows whether it does (`runs_of_layers`), and a step in which it does not is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.compute.attention_mask import NotUnderstood
from engine.compute.cpu.layers.layer_kernel import LayerKernel, LayerStack

if TYPE_CHECKING:
    from engine.compute.cpu.attention import CpuPlan
    from engine.compute.cpu.layers.layer_reading import Watched

__all__ = ["Computed", "Stack", "runs_of_layers"]


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """What the first layer of a stack has computed in a step: `result [1, T, dim]`, with these cos and sin."""

    stack: Stack
    result: Tensor
    angles: tuple[Tensor, Tensor]


class Stack:
    """Consecutive decoder layers."""

    def __init__(self, numbers: Sequence[int], kernels: Sequence[LayerKernel]) -> None:
        """numbers: of the layers, in the cache, in order; kernels: theirs."""
        self._numbers = tuple(numbers)
        self._kernel = LayerStack(kernels)

    def __call__(self, number: int, plan: CpuPlan, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Compute all layers if `number` is the first one's; else return x.

        Args:
            x: `[1, T, dim] float32`; angles: cos and sin, `[1, T, angles] float32`.

        Raises:
            NotUnderstood: a later layer got something else than the one before it gave.
        """
        if number == self._numbers[0]:
            keys, values = ([part[n] for n in self._numbers] for part in (plan.cache.keys, plan.cache.values))
            cos, sin = angles
            y: Tensor = self._kernel(plan.kernel_plan, x[0], cos[0], sin[0], keys, values).unsqueeze(0)
            plan.computed = Computed(self, y, angles)
            return y
        done: Computed | None = plan.computed
        if done is None or done.stack is not self or done.result is not x or not _same(done.angles, angles):
            raise NotUnderstood(f"layer {number} got something else than the layer before it gave")
        return x


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

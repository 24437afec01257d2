"""Launches a step before the tokens of the step before it have reached the host. Knows rows and tokens.

    device:  step k ── sampler ── step k+1 ──────── sampler …
    host:    launch k+1 ─┘  read k's tokens, stop strings, text, grammars, schedule k+1

The device's own winners go straight into the next step's tokens. The host decides the draw again, by the law's
definition, and takes what was launched only where the two agree. By the law a row's bits depend on no other row: so a
schedule that asks for fewer sequences takes theirs, and one that asks for anything else has all computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, field
from weakref import WeakMethod

import torch
from torch import Tensor

from engine.compute.model_runner import PackedStep
from engine.errors import out_of_memory
from engine.scheduling.schedule import Schedule
from engine.scheduling.sequence import Sequence

__all__ = ["CudaLookahead"]

Compute = Callable[[PackedStep, Seq[tuple[int, int]], Tensor | None], tuple[Tensor, Tensor]]
"""Launches a step: see `engine.compute.cuda.runner.CudaRunner.compute`."""


@dataclass(slots=True)
class _Launched:
    """A step that was launched.

    Attributes:
        rows: of each sequence and position; tokens: of each row, once they are known.
        logits: `[rows, vocab]`; finite: `[rows]`.
    """

    rows: dict[tuple[Sequence, int], int]
    logits: Tensor
    finite: Tensor
    tokens: list[int] = field(default_factory=list)


class CudaLookahead:
    """Launches and keeps one step (see `engine.compute.model_runner.Lookahead`).

    Attributes:
        taken, dropped: steps that were launched and then used, or not.
    """

    def __init__(self, compute: Compute) -> None:
        """compute: a method of the runner, held weakly: a cycle would keep the runner's cache and graphs alive."""
        self._method = WeakMethod(compute)
        self._launched: _Launched | None = None
        self.taken = 0
        self.dropped = 0

    @torch.inference_mode()
    def launch(self, sequences: Seq[Sequence], tokens: Seq[Tensor]) -> None:
        """Launch one row of each sequence, behind the token that it is drawing."""
        self.drop()
        step = PackedStep([], [], [], [], [])
        for sequence in sequences:
            step.add([0], len(sequence), tuple(sequence.block_table), 1)
        rows = {(sequence, len(sequence)): row for row, sequence in enumerate(sequences)}
        try:
            self._launched = _Launched(rows, *self._compute()(step, (), torch.cat(list(tokens))))
        except Exception as error:
            if not out_of_memory(error):
                raise

    def _compute(self) -> Compute:
        compute = self._method()
        assert compute is not None, "the runner is gone"
        return compute

    def confirm(self, tokens: Seq[int]) -> None:
        """Note what the device took for the tokens."""
        if self._launched is not None:
            self._launched.tokens = list(tokens)

    def drop(self) -> None:
        """Forget what was launched."""
        self.dropped += self._launched is not None
        self._launched = None

    def take(self, schedule: Schedule) -> tuple[Tensor, Tensor] | None:
        """Return logits and finite rows of a schedule that asks for rows of the launched step only; else None.

        What was launched is forgotten in either case.
        """
        launched = self._launched
        rows = None if launched is None else _rows_of(schedule, launched)
        if launched is None or rows is None:
            self.drop()
            return None
        self._launched, self.taken = None, self.taken + 1
        if rows == list(range(len(rows))):
            return launched.logits[: len(rows)], launched.finite[: len(rows)]
        return _select(launched.logits, rows), _select(launched.finite, rows)


def _rows_of(schedule: Schedule, launched: _Launched) -> list[int] | None:
    """Return the launched row of each chunk; None if there is none, or it was computed of another token."""
    rows: list[int] = []
    if schedule.copies:
        return None
    for chunk in schedule.chunks:
        row = launched.rows.get((chunk.sequence, chunk.start)) if chunk.count == chunk.num_rows == 1 else None
        if row is None or launched.tokens[row : row + 1] != chunk.tokens:
            return None
        rows.append(row)
    return rows


def _select(tensor: Tensor, rows: Seq[int]) -> Tensor:
    """Pick rows without an upload: each is a view, and they are joined on the device."""
    return torch.cat([tensor[row : row + 1] for row in rows])

"""`RowLimit`: how many rows of logits a step may have beside one for each sequence, as far as memory reaches."""

from __future__ import annotations

import logging
from typing import Final

from engine.scheduling.schedule import Schedule
from engine.scheduling.scheduler import Scheduler

__all__ = ["RowLimit"]

log = logging.getLogger("verbatim.engine")

_STEPS_TO_RECOVER: Final = 1024
"""Steps after which twice as many are tried again."""


class RowLimit:
    """Lowers a scheduler's `max_rows` where a step did not fit for its rows' sake, and raises it again in time.

    Rows of drafts and of scored prompts are the first thing to go without: the same is computed in more steps.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._most = self._before = scheduler.max_rows
        self._too_many: int | None = None  # the extra rows of a step that did not fit and is tried without them
        self._steps = 0

    def try_without(self, schedule: Schedule) -> bool:
        """Whether a step that did not fit may be tried again without its extra rows."""
        rows = sum(max(chunk.num_rows - 1, 0) for chunk in schedule.chunks)
        if self._scheduler.whole_prompts or not rows or self._too_many is not None:
            return False
        self._too_many, self._before = rows, self._scheduler.max_rows
        self._scheduler.max_rows = 0
        return True

    def settle(self, *, fits: bool) -> None:
        """Note whether a step has fitted. If it was the second try, half of the rows that were too many are allowed."""
        self._steps += 1
        if self._too_many is not None:
            self._scheduler.max_rows = max(self._too_many // 2, 1) if fits else self._before
            if fits:
                log.warning("memory ran out; a step has at most %d extra rows of logits now", self._scheduler.max_rows)
            self._too_many = None
        elif self._steps % _STEPS_TO_RECOVER == 0:
            self._scheduler.max_rows = min(2 * self._scheduler.max_rows, self._most)

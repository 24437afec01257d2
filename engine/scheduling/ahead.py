"""Decide whether the next step is known before this one's tokens are, so that a GPU can begin with it. Pure.

It is known where every running sequence draws one token now and will compute that token next: no prompt is under way
or waits, nothing is drafted. A sequence may still end at its token (a stop string, an end token, an abort): then its
row was computed for nothing, and the others' rows are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq

from engine.scheduling.schedule import Draw
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence

__all__ = ["foresee"]


def foresee(draws: Seq[Draw], scheduler: Scheduler, may_draft: Callable[[Sequence], bool]) -> list[int]:
    """Return which draws' sequences the next step computes, by their place in `draws`; none if it is not known.

    Those sequences have a block for the next step's token then, which nobody else reads.

    Args:
        may_draft: whether a sequence may have a draft in the next step, or takes another token than it draws.
    """
    drawn = {draw.sequence for draw in draws}
    if scheduler.waiting or len(drawn) != len(draws) or drawn != set(scheduler.running):
        return []
    if any(draw.draft or draw.expected is not None or may_draft(draw.sequence) for draw in draws):
        return []
    going = [n for n, draw in enumerate(draws) if draw.generated + 1 < (draw.params.max_tokens or 0)]
    return going if going and scheduler.reserve_next([draws[n].sequence for n in going]) else []

"""`MaskWorker`: computes the grammar masks of a step, and slow ones on a thread beside the steps. Knows no model.

    step k: a token is drawn, the grammar advances ──▶ its next mask is begun on a thread of its own
    step k + 1, k + 2, …: the sequence is left out, all others go on
    the mask is ready ──▶ the sequence is in the step again

An ambiguous grammar can take a second for one mask, and no count of its parser's predicts it. The law makes it harmless
to leave a sequence out of some steps: *when* a token is drawn may depend on a clock, *which* one may not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engine.grammar.compiler import GrammarCompiler, GrammarState

__all__ = ["MaskWorker"]

SLOW: Final = 0.02
"""Seconds for a step's masks above which their states count as slow. Ordinary masks take a hundredth of that."""
_REST: Final = 0.05
"""Seconds that a step without any other work waits for a mask at most."""


class MaskWorker:
    """Computes masks for one engine, whose thread is the only one to call it."""

    def __init__(self, grammars: GrammarCompiler) -> None:
        self._grammars = grammars

    def masks(self, states: Sequence[GrammarState | None], forced: Sequence[int | None]) -> NDArray[np.int32]:
        """Return what `GrammarCompiler.masks` does. Masks that were computed ahead are reused."""
        known = {
            i: state.ahead.result()
            for i, state in enumerate(states)
            if state is not None and state.ahead is not None and forced[i] is None
        }
        began = time.perf_counter()
        allowed = self._grammars.masks(states, forced, known)
        slow = time.perf_counter() - began > SLOW
        for i, state in enumerate(states):
            if state is None:
                continue
            state.ahead = None
            if slow and forced[i] is None and i not in known:
                state.slow = True  # or another one of this step: the next mask will tell
        return allowed

    def look_ahead(self, state: GrammarState) -> None:
        """Begin the next mask of a slow state. The state must not be used until `waits` is false again."""
        if state.slow and state.ahead is None and state.forced is None and not state.stopped:
            state.ahead = self._beside.submit(self._compute, state)

    def waits(self, state: GrammarState) -> bool:
        """Return whether a state's next mask is still being computed."""
        return state.ahead is not None and not state.ahead.done()

    def rest(self, states: Iterable[GrammarState]) -> None:
        """Wait briefly for the first of these states' masks."""
        ahead: list[Future[Any]] = [state.ahead for state in states if state.ahead is not None]
        wait(ahead, _REST, FIRST_COMPLETED)

    def close(self) -> None:
        """Stop: begin no further mask."""
        if "_beside" in self.__dict__:
            self._beside.shutdown(wait=False, cancel_futures=True)

    @functools.cached_property
    def _beside(self) -> ThreadPoolExecutor:
        # One thread for all: whatever slow grammars cost, they cost one core.
        return ThreadPoolExecutor(1, thread_name_prefix="masks")

    def _compute(self, state: GrammarState) -> NDArray[np.int32]:
        began = time.perf_counter()
        bits = self._grammars.bits(state)
        state.slow = time.perf_counter() - began > SLOW
        return bits

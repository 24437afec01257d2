"""A grammar whose masks take long slows nobody but its own reply, and changes no bit of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import LLM, Constraint
from engine.grammar.compiler import GrammarCompiler, GrammarState
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import SequenceState

FORM = Constraint("regex", "[a-f ]{4,60}")
WANTED: dict[str, Any] = {"max_tokens": 12, "seed": 3, "temperature": 1.0, "logprobs": True, "top_logprobs": 3}


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> Iterator[LLM]:
    llm = LLM(tiny("qwen3"), context_length=512, cache_size="16MiB", threads=1)
    yield llm
    llm.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every mask of a grammar takes 30 ms; the names of the threads that computed one."""
    threads: list[str] = []
    bits, masks = GrammarCompiler.bits, GrammarCompiler.masks

    def slow_bits(self: GrammarCompiler, state: GrammarState) -> NDArray[np.int32]:
        threads.append(threading.current_thread().name)
        time.sleep(0.03)
        return bits(self, state)

    def slow_masks(self: GrammarCompiler, states: Any, forced: Any, known: Any = None) -> NDArray[np.int32]:
        fresh = [s for i, s in enumerate(states) if s is not None and forced[i] is None and i not in (known or {})]
        threads.extend("step" for _ in fresh)
        time.sleep(0.03 * bool(fresh))
        return masks(self, states, forced, known)

    monkeypatch.setattr(GrammarCompiler, "bits", slow_bits)
    monkeypatch.setattr(GrammarCompiler, "masks", slow_masks)
    return threads


def entries(llm: LLM, **more: Any) -> list[Any]:
    return [
        (c.text, c.token_ids, c.logprobs, c.finish_reason)
        for c in llm.generate("say", constraint=FORM, **WANTED, **more)
    ]


@pytest.mark.parametrize("n", [1, 3])
def test_the_reply_is_the_same(llm: LLM, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    usual = entries(llm, n=n)
    with monkeypatch.context() as patch:
        patch.setattr("engine.grammar.mask_worker.SLOW", -1.0)  # every mask is a slow one
        assert entries(llm, n=n) == usual
    assert entries(llm, n=n) == usual


def test_only_its_own_reply_waits(llm: LLM, slow: list[str]) -> None:
    """While a mask is computed, a reply without a grammar goes on by many tokens."""
    held = llm.stream("say", constraint=FORM, **WANTED)
    free = llm.stream("tell", max_tokens=300, seed=1, ignore_eos=True)
    next(held)
    got: dict[str, int] = {"free": 0}
    for _ in free:
        got["free"] += 1
        if len(slow) >= 6:
            break
    assert got["free"] > 20, f"{got['free']} tokens went by during {len(slow)} slow masks"
    assert slow.count("step") <= 2, "slow masks are still computed within a step"
    assert any(name.startswith("masks") for name in slow)
    free.close()
    assert sum(len(output.deltas) for output in held) > 0


def test_a_step_with_nothing_else_to_do_rests(llm: LLM, slow: list[str]) -> None:
    """Alone, it costs no processor time to wait for a mask."""
    began = time.thread_time()
    steps = llm.engine.stats().steps
    llm.generate("say", constraint=FORM, **WANTED)
    assert llm.engine.stats().steps - steps < 5 * WANTED["max_tokens"], "the engine turned round and round"
    assert time.thread_time() - began < 0.03 * len(slow)


def test_a_state_that_is_quick_again_is_no_longer_watched(llm: LLM) -> None:
    state = llm.engine.model.grammars.start("start: /[a-f ]{4,60}/")
    worker = llm.engine._masks
    state.slow = True
    worker.look_ahead(state)
    ahead = state.ahead.result()
    assert not state.slow
    assert not worker.waits(state)
    fresh = llm.engine.model.grammars.masks([state], [None])
    assert (worker.masks([state], [None]) == fresh).all()
    assert state.ahead is None
    worker.look_ahead(state)
    assert state.ahead is None, "a quick one is computed within the step"
    assert ahead.dtype == np.int32


def test_one_that_is_preempted_meanwhile_comes_back_with_the_same_bits(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, slow: list[str]
) -> None:
    """It may not be admitted before its mask is there: the step would wait for it."""
    usual = entries(llm)
    waited: list[bool] = []
    schedule = Scheduler.schedule

    def preempting(self: Scheduler, held: Any = (), propose: Any = None) -> Any:
        for sequence in list(held):
            if sequence.state is SequenceState.RUNNING and len(waited) < 5:
                waited.append(True)
                self._preempt(sequence)
        made = schedule(self, held, propose)
        assert not any(chunk.sequence in held for chunk in made.chunks)
        self.check()
        return made

    monkeypatch.setattr(Scheduler, "schedule", preempting)
    assert entries(llm) == usual
    assert waited


def test_who_leaves_meanwhile_leaves_nothing_behind(llm: LLM, slow: list[str]) -> None:
    stream = llm.stream("say", constraint=FORM, **WANTED)
    next(stream)
    next(stream)
    stream.close()
    assert not llm.engine.has_work
    assert entries(llm) == entries(llm)


def test_a_preempted_sequence_is_held_behind_choices_that_wait_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices without room wait in front of it. Admitted too early, it would make every request wait for its mask."""
    names = [llm.add("say", constraint=FORM, **WANTED, n=n).request_id for n in (1, 2)]
    preempted, choice = (llm.engine._requests[name].choices[i].sequence for i, name in enumerate(names))
    preempted.append(5)
    monkeypatch.setattr(llm.engine._scheduler, "waiting", deque([choice, preempted]))
    monkeypatch.setattr(llm.engine._masks, "waits", lambda state: True)
    assert preempted in llm.engine._held()
    for name in names:
        llm.engine.abort(name)

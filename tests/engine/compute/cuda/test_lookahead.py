"""A step that is launched before the last one's tokens are known: the same replies, and most steps are used."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from on_reference import reference_backend

from engine import LLM, Constraint
from engine.compute.cuda.steps.lookahead import CudaLookahead
from engine.llm import join_outputs
from engine.sampling.drawing import Drawing

PROMPT = "the bits of a reply"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0},
    "everything that edits logits": {
        "top_p": 0.9,
        "top_k": 30,
        "min_p": 0.01,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {70: 3.0},
        "logprobs": True,
        "top_logprobs": 3,
    },
    "choices": {"n": 3},
    "a stop string": {"stop": ["e"]},
    "a few tokens": {"max_tokens": 2},
    "one token": {"max_tokens": 1},
}


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> Iterator[LLM]:
    with reference_backend():
        yield LLM(tiny("qwen3"), context_length=512, cache_size="16MiB", max_sequences=6)


def ahead_of(llm: LLM) -> CudaLookahead:
    lookahead = llm.engine.model.runner.lookahead
    assert isinstance(lookahead, CudaLookahead)
    return lookahead


def generate(llm: LLM, **params: Any) -> Any:
    chosen = {"max_tokens": 40, "ignore_eos": True, "seed": 7, "temperature": 0.9, **params}
    return [(c.token_ids, c.text, c.finish_reason, c.logprobs) for c in llm.generate(PROMPT, **chosen)]


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def stop() -> None:
        monkeypatch.setattr("engine.engine.foresee", lambda *_: [])

    return stop


@pytest.mark.parametrize("kind", KINDS)
def test_replies_are_the_same_with_and_without(kind: str, llm: LLM, never: Callable[[], None]) -> None:
    lookahead = ahead_of(llm)
    taken, dropped = lookahead.taken, lookahead.dropped
    replies = generate(llm, **KINDS[kind])
    steps = max(len(ids) for ids, *_ in replies)
    # The step after a prompt is launched ahead, too, but where choices are about to copy its last block.
    assert lookahead.taken - taken >= steps - 2
    assert lookahead.dropped - dropped <= 1, "only what was launched behind an end"
    never()
    taken = lookahead.taken
    assert generate(llm, **KINDS[kind]) == replies
    assert lookahead.taken == taken


def test_the_device_being_wrong_costs_a_step_and_no_bit(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right = generate(llm, max_tokens=20)
    real = Drawing.device_tokens
    monkeypatch.setattr(Drawing, "device_tokens", lambda drawing: real(drawing) ^ 1)
    lookahead = ahead_of(llm)
    monkeypatch.setattr(Drawing, "_note_device_tokens", _noted_wrong)
    taken, dropped = lookahead.taken, lookahead.dropped
    assert generate(llm, max_tokens=20) == right
    assert lookahead.taken == taken
    assert lookahead.dropped - dropped >= 18


def _noted_wrong(drawing: Drawing, rows: Any) -> None:
    drawing.device_told = [int(token) ^ 1 for token in rows[0]]


def test_a_crowd_that_comes_and_goes(llm: LLM, never: Callable[[], None]) -> None:
    """Requests arrive, end and are aborted between any two steps; some have a grammar, some share a prompt."""

    def crowd() -> tuple[dict[str, Any], int]:
        draw, taken = random.Random(3), ahead_of(llm).taken
        outputs: dict[str, list[Any]] = {}
        waiting = list(range(14))
        while waiting or llm.engine.has_work:
            if waiting and draw.random() < 0.2:
                number = waiting.pop(0)
                more = {"max_tokens": draw.randrange(1, 30), "n": draw.choice((1, 1, 2)), "seed": number}
                if number % 4 == 3:
                    more["constraint"] = Constraint("regex", "[a-z]{1,3}( [a-z]+)*")
                prepared = llm.add(f"{PROMPT} {number % 3} " * draw.randrange(1, 4), temperature=0.8, **more)
                outputs[prepared.request_id] = []
            if outputs and draw.random() < 0.02:
                gone = draw.choice(list(outputs))
                llm.engine.abort(gone)
            for output in llm.engine.step():
                outputs[output.request_id].append(output)
        found = {str(n): join_outputs(outputs[name], 0) for n, name in enumerate(outputs) if outputs[name]}
        told = {n: [(c.token_ids, c.text, c.finish_reason) for c in choices] for n, choices in found.items()}
        return told, ahead_of(llm).taken - taken

    replies, taken = crowd()
    assert taken > 30
    never()
    again, none = crowd()
    assert none == 0
    assert again == replies


def test_a_step_without_memory_is_computed_in_its_turn(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right, lookahead = generate(llm, max_tokens=12), ahead_of(llm)

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    taken = lookahead.taken
    monkeypatch.setattr(lookahead, "_compute", lambda: fails)
    assert generate(llm, max_tokens=12) == right
    assert lookahead.taken == taken

"""Draft tokens: text that repeats itself is drafted, other text is not; replies are the same with drafts or without."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from engine import LLM, Constraint, ReproducibilityReport
from engine.engine import Engine
from engine.llm import join_outputs
from engine.scheduling.drafts import MOST, NGRAM, Drafter
from engine.scheduling.sequence import Sequence
from engine.types.sampling_params import SamplingParams


def sequence(prompt: list[int], output: list[int] | None = None) -> Sequence:
    made = Sequence("r", 0, tuple(prompt), SamplingParams(), 0)
    for token in output or ():
        made.append(token)
    return made


def test_what_came_after_the_same_tokens_is_drafted() -> None:
    drafter = Drafter()
    assert drafter.propose(sequence([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]), 10) == (4, 5, 6, 7)
    assert drafter.propose(sequence([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]), 2) == (4, 5)
    assert Drafter().propose(sequence([1, 2, 3, 4, 9, 2, 3]), 10) == ()
    assert Drafter().propose(sequence([1, 2]), 10) == ()
    assert Drafter().propose(sequence([1, 2, 3, 4, 1, 2, 3]), 0) == ()


def test_the_last_time_counts_and_a_cycle_goes_on() -> None:
    assert Drafter().propose(sequence([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]), 10)[:1] == (5,)
    assert Drafter().propose(sequence([7, 7, 7, 7]), 10) == (7, 7, 7, 7)
    assert Drafter().propose(sequence([1, 2, 1, 2, 1, 2]), 10) == (1, 2, 1, 2)


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60), cuts=st.lists(st.integers(0, 59), max_size=8))
def test_a_draft_does_not_depend_on_when_it_was_asked_before(tokens: list[int], cuts: list[int]) -> None:
    growing, drafter = sequence(tokens[:1]), Drafter()
    for at in range(1, len(tokens)):
        if at in cuts:
            drafter.propose(growing, 8)
        growing.append(tokens[at])
    draft = drafter.propose(growing, 8)
    assert draft == Drafter().propose(sequence(tokens), 8)
    places = [i for i in range(NGRAM, len(tokens)) if tokens[i - NGRAM : i] == tokens[-NGRAM:]]
    assert bool(draft) == bool(places)
    if places:
        assert draft[0] == tokens[places[-1]]


def test_drafts_grow_with_success_and_rest_after_failure() -> None:
    drafter, repeating = Drafter(), sequence([5] * 40)
    for _ in range(4):
        drafter.learn(len(drafter.propose(repeating, 99)), drafter.limit)
    assert len(drafter.propose(repeating, 99)) == MOST
    asked = 0
    for _ in range(400):
        draft = drafter.propose(repeating, 99)
        if draft:
            drafter.learn(len(draft), 0)
            asked += 1
    assert asked < 16, "what never comes is hardly drafted"
    drafter = Drafter()
    drafter.learn(4, 0)
    drafter.learn(2, 1)
    assert drafter.propose(repeating, 99), "one miss does not stop it, and a hit makes up for it"


REPEATING = "def add(a, b):\n    return a + b\n\n" * 6
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "n": 2, "max_tokens": 17},
    {"temperature": 0.3, "seed": 5, "frequency_penalty": -0.4, "repetition_penalty": 0.9},
    {"temperature": 0, "logit_bias": {70: 8.0}, "presence_penalty": 1.0},
    {"temperature": 0, "min_tokens": 20, "stop": ["a", "e"]},
    {"temperature": 0, "logprobs": True, "top_logprobs": 3, "logprobs_mode": "processed"},
    {"temperature": 0, "thinking_budget": None, "top_k": 3},
]


@pytest.fixture(scope="module")
def models(tiny: Callable[[str], Path]) -> tuple[LLM, LLM]:
    """The same model without and with drafts."""
    how: dict[str, Any] = {"cache_size": "32MiB", "context_length": 512}
    return LLM(tiny("qwen3"), **how), LLM(tiny("qwen3"), speculation="ngram", **how)


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: "-".join(p))
def test_replies_are_the_same_and_take_fewer_steps(models: tuple[LLM, LLM], params: dict[str, Any]) -> None:
    given = {"max_tokens": 120, "seed": 1, "ignore_eos": "stop" not in params, **params}
    before = [model.engine.stats() for model in models]
    replies = [model.generate(REPEATING, **given) for model in models]
    after = [model.engine.stats() for model in models]
    assert [(c.token_ids, c.text, c.finish_reason, c.logprobs) for c in replies[0]] == [
        (c.token_ids, c.text, c.finish_reason, c.logprobs) for c in replies[1]
    ]
    steps = [b.steps - a.steps for a, b in zip(before, after, strict=True)]
    accepted = after[1].accepted_tokens - before[1].accepted_tokens
    assert steps[1] <= steps[0]
    if given["temperature"] == 0 and "stop" not in params and params.get("n") is None:
        assert accepted > 20, "a tiny model at temperature 0 soon repeats itself"
        assert steps[1] < 0.75 * steps[0]
    assert after[0].drafted_tokens == 0


def test_neighbours_grammars_and_preemption(models: tuple[LLM, LLM]) -> None:
    """Guessing sequences beside others, in a cache that is too small: the same replies, and every block comes back."""
    plain, drafting = models
    prompts = [REPEATING, "one two three one two three one two", "nothing of the kind", REPEATING[:50]]
    expected = [plain.generate(p, max_tokens=60, temperature=0, ignore_eos=True, seed=1)[0].token_ids for p in prompts]
    pool = drafting.engine.model.scheduler.pool
    hog = pool.allocate(pool.num_free - 20, "a hog")
    params = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "seed": 1}
    requests = [drafting.add(p, **params).request_id for p in prompts]
    outputs: dict[str, list[Any]] = {name: [] for name in requests}
    preemptions = drafting.engine.model.scheduler.num_preemptions
    while drafting.engine.has_work:
        for output in drafting.engine.step():
            outputs[output.request_id].append(output)
        pool.check()
    assert [join_outputs(outputs[name], 0)[0].token_ids for name in requests] == expected
    assert drafting.engine.model.scheduler.num_preemptions > preemptions
    pool.release(hog, "a hog")
    assert pool.num_free == pool.num_blocks
    form = Constraint("json", {"enum": ["aaaa aaaa aaaa aaaa", 1]})
    choices = [model.generate("x", constraint=form, seed=2)[0] for model in models]
    assert choices[0].token_ids == choices[1].token_ids


def test_no_drafts_where_they_would_change_a_reply(models: tuple[LLM, LLM], caplog: pytest.LogCaptureFixture) -> None:
    loaded = models[1].engine.model
    broken = replace(loaded, info=replace(loaded.info, law=ReproducibilityReport(False, "bits differ: packed")))
    assert not Engine(broken).speculates
    assert "bits differ: packed" in caplog.text


def test_drafts_that_are_wrong_leave_nothing_behind(models: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Random draft tokens, right by chance only: the reply, its follow-up from the prefix cache, and the blocks."""
    _, drafting = models
    rng = random.Random(3)
    monkeypatch.setattr(
        Drafter, "propose", lambda _, s, room: tuple(rng.randrange(400) for _ in range(min(room, rng.randrange(9))))
    )
    given = {"max_tokens": 50, "seed": 9, "ignore_eos": True}
    for prompt in ("a b c", "a b c d", REPEATING):
        replies = [model.generate(prompt, **given)[0] for model in models]
        assert replies[0].token_ids == replies[1].token_ids
        follow = [model.generate(f"{prompt}{replies[0].text} and then", **given)[0] for model in models]
        assert follow[0].token_ids == follow[1].token_ids
    assert drafting.engine.model.scheduler.pool.num_free == drafting.engine.model.scheduler.pool.num_blocks

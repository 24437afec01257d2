"""Draws that are compared with an expected token: its scores, and how close it was to being drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine.sampling.answers import Answers
from engine.sampling.rng import gap_of, gumbel, hash_token, stream_key
from engine.sampling.sampler import Sampled, Sampler
from engine.scheduling.sequence import Sequence
from engine.types.sampling_params import SamplingParams

VOCAB, LAST = 50, 48
SAMPLER = Sampler(VOCAB, (7, 49), ())


class Row:
    """A draw at position 0 whose token is known."""

    def __init__(self, seed: int, expected: int | None, **given: Any) -> None:
        self._sequence = Sequence("r", 0, (1,), SamplingParams(**given), seed)
        self.expected = expected

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sequence, name)


def closeness(scores: list[float], perturbed: list[float], expected: int, min_p: float) -> float:
    """How much scores must change: every better token is overtaken or cut off, and the expected one is kept."""
    floor = math.log(min_p) if min_p else -math.inf
    ahead = [min(p - perturbed[expected], s - floor) for p, s in zip(perturbed, scores, strict=True)]
    return max(0.0, floor - scores[expected], *(a for i, a in enumerate(ahead) if i != expected))


@pytest.mark.parametrize("given", [{}, {"temperature": 0.4}, {"min_p": 0.3}, {"temperature": 2.0, "min_p": 0.02}])
def test_a_draw_is_compared_with_an_expected_token(given: dict[str, Any]) -> None:
    """Every token in turn, in one batch: what was drawn is at 0, the others where the definition has them."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(8)) * 1.5
    params = SamplingParams(**given)
    allowed = [i for i in range(LAST + 1) if i != 7]
    edited = [value if i in allowed else -math.inf for i, value in enumerate(logits[0, : LAST + 1].tolist())]
    key, logprobs = stream_key(3, 0, 0), torch.log_softmax(logits[0].double(), -1).tolist()
    scores = [(value - max(edited)) / params.temperature for value in edited]
    perturbed = [s + gumbel(gap_of(hash_token(key, i))) for i, s in enumerate(scores)]
    results = SAMPLER.sample(logits, [Row(3, i, **given) for i in range(VOCAB)], [0] * VOCAB)
    others = 0
    for i, one in enumerate(results):
        assert isinstance(one, Sampled)
        assert one.check is not None
        assert (one.check.expected, one.check.drawn) == (i, one.token_id)
        assert one.check.logprob == pytest.approx(logprobs[i], rel=1e-6)
        if i not in allowed:
            assert (one.check.perturbed, one.check.closeness) == (-math.inf, math.inf)
            continue
        assert one.check.perturbed == pytest.approx(perturbed[i], rel=1e-6)
        wanted = closeness(scores, perturbed, i, params.min_p)
        assert one.check.closeness == pytest.approx(wanted, abs=1e-12)
        others += i != one.token_id
        assert (one.check.closeness == 0.0) == (i == one.token_id)
    assert others == len(allowed) - 1


def test_at_temperature_0_logits_are_compared() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 9], logits[0, 49] = 3.0, 2.25, 9.0
    checks = [
        one.check
        for one in SAMPLER.sample(logits, [Row(1, i, temperature=0.0) for i in (4, 9, 7, 49)], [0] * 4)
        if isinstance(one, Sampled) and one.check is not None
    ]
    assert [check.drawn for check in checks] == [4] * 4
    assert [check.perturbed for check in checks] == [3.0, 2.25, -math.inf, -math.inf]
    assert [check.closeness for check in checks] == [0.0, 0.75, math.inf, math.inf]


def test_the_lowest_of_equals_is_drawn() -> None:
    """Wherever it stands among the contenders."""
    row = Row(1, None)
    for ids in ([5.0, 3.0, 8.0], [3.0, 8.0, 5.0]):
        answers = Answers([row], [0], VOCAB)
        answers.add_peaks([0], [[0.0]], [[0.0]])
        answers.add_contenders([0], [ids], [[7.0, 7.0, 7.0]], [[-1.0, -1.0, -math.inf]], [[1.0]])
        [found] = answers.results()
        assert isinstance(found, Sampled)
        assert found.token_id == min(ids[:2])

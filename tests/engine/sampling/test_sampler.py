"""The sampler against a slow and plain one, and the law: a row's token and logprobs depend on the row alone."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from engine.errors import InvalidParameter, NumericalFault
from engine.sampling.rng import gap_of, gumbel, hash_token, stream_key
from engine.sampling.sampler import Sampled, Sampler
from engine.scheduling.sequence import Sequence
from engine.types.sampling_params import SamplingParams
from tests.packed_masks import packed

INF = math.inf
VOCAB, INVALID, END = 40, (7, 36, 37, 38, 39), (2, 3)
PLAIN = Sampler(VOCAB, INVALID, END)
REAL = 151_936


def sequence(
    params: SamplingParams, seed: int = 0, choice: int = 0, prompt: Rows[int] = (1,), output: Rows[int] = ()
) -> Sequence:
    s = Sequence(request_id="r", choice_index=choice, prompt_token_ids=tuple(prompt), params=params, seed=seed)
    for token in output:
        s.append(token)
    return s


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**given)


def f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())


def tokens_of(results: list[Any]) -> list[int]:
    assert all(isinstance(r, Sampled) for r in results), results
    return [r.token_id for r in results]


class Reference:
    """One row, one token, plain floats; nothing shared with the sampler but the bits and the final formula."""

    def __init__(self, logits: list[float], row: Sequence, allowed: list[bool] | None) -> None:
        p = row.params
        self.raw, self.row = logits, row
        self.edited = list(logits)
        for i, bias in p.logit_bias:
            if i < len(logits):
                self.edited[i] = f32(self.edited[i] + bias) if bias > -100 else -INF
        for i in {*row.prompt_token_ids, *row.output_token_ids}:
            x, r = self.edited[i], f32(p.repetition_penalty)
            self.edited[i] = f32(x / r if x > 0 else x * r)
        for i, n in Counter(row.output_token_ids).items():
            self.edited[i] = f32(self.edited[i] + f32(-(p.frequency_penalty * n + p.presence_penalty)))
        banned = set(INVALID) | {i for i, ok in enumerate(allowed or []) if not ok}
        if row.position < p.min_tokens:
            banned |= {*END, *p.stop_token_ids}
        self.edited = [-INF if i in banned else x for i, x in enumerate(self.edited)]
        self.peak = max(self.edited)
        self.order = sorted((i for i, x in enumerate(self.edited) if x > -INF), key=lambda i: (-self.edited[i], i))

    def kept(self) -> list[int]:
        p = self.row.params
        if p.temperature == 0:
            return self.order
        score = {i: (self.edited[i] - self.peak) / p.temperature for i in self.order}
        kept = self.order[: p.top_k or None]
        total, mass, run = math.fsum(math.exp(score[i]) for i in kept), 0.0, []
        for i in kept:
            if run and p.top_p < 1 and mass >= p.top_p * total * (1 - 1e-12):
                break
            run.append(i)
            mass += math.exp(score[i])
        return [i for i in run if p.min_p == 0 or score[i] >= math.log(p.min_p)]

    def token(self) -> int:
        row, t = self.row, self.row.params.temperature
        if t == 0:
            return self.order[0]
        key = stream_key(row.seed, row.choice_index, row.position)
        perturbed = {i: (self.edited[i] - self.peak) / t + gumbel(gap_of(hash_token(key, i))) for i in self.kept()}
        return min(perturbed, key=lambda i: (-perturbed[i], i))

    def logprobs(self) -> dict[int, float]:
        p = self.row.params
        if p.logprobs_mode == "raw":
            ids, values, t = range(len(self.raw)), self.raw, 1.0
        else:
            ids, values, t = self.kept(), self.edited, p.temperature or 1.0
        peak = max(values[i] for i in ids)
        total = math.log(math.fsum(math.exp((values[i] - peak) / t) for i in ids))
        return {i: (values[i] - peak) / t - total for i in ids if values[i] > -INF}


logit_rows = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.5, -8.0, -INF]), st.floats(-20, 20, width=16)),
    min_size=VOCAB,
    max_size=VOCAB,
).filter(lambda row: max(row[i] for i in range(VOCAB) if i not in INVALID) > -INF)

any_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.0]),
        # No value at which a sum of 1/k or 1/2**k could come to stand: rounding is test_logits' matter.
        "top_p": st.sampled_from([0.0, 0.123, 0.517, 0.9031, 1.0]),
        "top_k": st.sampled_from([0, 1, 3, 10, 39, 1000]),
        "min_p": st.sampled_from([0.0, 0.0103, 0.51, 1.0]),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2.0),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 3.0, 99.0]), max_size=4
        ),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.just((5, 6)),
        "logprobs_mode": st.sampled_from(["raw", "processed"]),
        "top_logprobs": st.integers(0, 20),
    },
).map(lambda fields: SamplingParams(logprobs=True, **fields))

ids = st.integers(0, VOCAB - 1)
any_row = st.builds(
    sequence,
    any_params,
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 3),
    st.lists(ids, min_size=1, max_size=6),
    st.lists(ids, max_size=6),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(logit_rows, any_row), min_size=1, max_size=5), st.booleans(), st.randoms())
def test_equals_the_plain_sampler(batch: list[tuple[list[float], Sequence]], grammar: bool, random: Any) -> None:
    """Every control at once, in crowds of mixed rows: the token, its logprob and the top entries are the formula's."""
    logits = torch.tensor([values for values, _ in batch], dtype=torch.float32)
    rows = [row for _, row in batch]
    allowed = [[random.random() < 0.7 for _ in range(VOCAB)] for _ in rows] if grammar else None
    before = logits.clone()
    results = PLAIN.sample(logits, rows, allowed=None if allowed is None else packed(allowed))
    assert torch.equal(logits, before)  # the caller's
    for i, (row, result) in enumerate(zip(rows, results, strict=True)):
        reference = Reference(logits[i].tolist(), row, allowed[i] if allowed else None)
        if not reference.order:
            assert isinstance(result, InvalidParameter)
            assert result.code == "no_token_left"
            continue
        assert isinstance(result, Sampled)
        assert result.token_id == reference.token()
        expected = reference.logprobs()
        assert result.logprob == pytest.approx(expected[result.token_id], abs=1e-9)
        assert result.logprob <= 0
        listed = sorted((i for i in expected if i not in INVALID), key=lambda i: (-expected[i], i))
        assert [i for i, _ in result.top] == sorted(
            listed[: row.params.top_logprobs], key=lambda i: (-dict(result.top)[i], i)
        )
        assert dict(result.top) == pytest.approx({i: expected[i] for i, _ in result.top}, abs=1e-9)


# Who may sit beside whom: every way through the sampler, with logprobs of both kinds.
CROWD = [
    params(temperature=0.0),
    params(temperature=0.0, logprobs=True, top_logprobs=3, logprobs_mode="processed"),
    params(logprobs=True, top_logprobs=20),
    params(temperature=0.6, logprobs=True, top_logprobs=2, logprobs_mode="processed"),
    params(top_k=5, logprobs=True, logprobs_mode="processed", top_logprobs=9),
    params(top_p=0.5),
    params(top_p=0.97, temperature=1.7, logprobs=True, top_logprobs=1, logprobs_mode="processed"),
    params(top_k=700, top_p=0.9, min_p=0.01, logprobs=True),
    params(min_p=0.1, temperature=1.5),
    params(frequency_penalty=1.0, presence_penalty=-1.0, repetition_penalty=1.3),
    params(logit_bias={4: 5.0, 11: -100.0}, min_tokens=9, temperature=0.8),
]


def crowd(count: int) -> list[Sequence]:
    return [
        sequence(
            CROWD[i % len(CROWD)], seed=i * 7919 - 5, choice=i % 3, prompt=range(1, 6 + i), output=range(3, 3 + i % 5)
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(("width", "count"), [(61, 33), (4_099, 22), (REAL, 11)])
def test_a_row_depends_on_itself_alone(width: int, count: int) -> None:
    """Alone, in a crowd, in another order, on other threads: the same token and the same bits of every logprob."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(8)) * 3
    logits = torch.where(torch.arange(count).unsqueeze(1) % 2 == 0, noise, noise.bfloat16().float())
    rows, sampler = crowd(count), Sampler(width, range(width - 5, width), (2,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = sampler.sample(logits, rows)
        alone = [sampler.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(count)]
        torch.set_num_threads(2)
        backward = sampler.sample(logits.flip(0), rows[::-1])[::-1]
        # A view that starts elsewhere in memory, and rows that are chosen from a larger batch.
        shifted = torch.cat([torch.zeros(count, 3), logits], dim=1)[:, 3:]
        elsewhere = sampler.sample(shifted, [rows[0], *rows], [0, *range(count)])[1:]
    finally:
        torch.set_num_threads(before)
    assert tokens_of(together)
    assert together == alone == backward == elsewhere
    assert pickle.loads(pickle.dumps(together)) == together


def test_choices_share_a_row_and_choice_zero_is_the_single_one() -> None:
    """n = 4 draws from one row of logits; its choice 0 is the answer to n = 1, the others are draws of their own."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    p = params(logprobs=True, top_logprobs=2)
    single = [PLAIN.sample(logits[1:2], [sequence(p, seed, 0)])[0] for seed in range(20)]
    several = [PLAIN.sample(logits, [sequence(p, seed, c) for c in range(4)], [1] * 4) for seed in range(20)]
    assert [choices[0] for choices in several] == single
    assert all(len({c.token_id for c in choices}) > 1 for choices in several[:3])
    greedy = PLAIN.sample(logits, [sequence(params(temperature=0.0), 5, c) for c in range(4)], [2] * 4)
    assert len({r.token_id for r in greedy}) == 1


DISTRIBUTIONS = [
    params(),
    params(temperature=0.5),
    params(temperature=2.0),
    params(top_k=6),
    params(top_p=0.8),
    params(min_p=0.2),
    params(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05),
    params(frequency_penalty=0.5, logit_bias={9: 2.0, 10: -100.0}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "p", DISTRIBUTIONS, ids=lambda p: f"T{p.temperature}k{p.top_k}p{p.top_p}m{p.min_p}f{p.frequency_penalty}"
)
@pytest.mark.parametrize("axis", ["position", "seed"])
def test_draws_follow_the_distribution(p: SamplingParams, axis: str) -> None:
    """Chi-square of 8,000 draws, along the positions of one reply and along seeds, against the processed softmax."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5
    count, drawn = 8_000, Counter[int]()

    class At:
        def __init__(self, i: int) -> None:
            self.params, self.choice_index, self.prompt_token_ids = p, 0, (1,)
            self.records, self.expected = False, None
            self.seed, self.position = (12, i) if axis == "position" else (i - count // 2, 12)
            self.generated = self.position
            self.output_counts = Counter({5: 2})

    for start in range(0, count, 1_000):
        drawn.update(tokens_of(PLAIN.sample(logits, [At(i) for i in range(start, start + 1_000)], [0] * 1_000)))
    one = sequence(replace(p, logprobs=True, logprobs_mode="processed"), output=(5, 5))
    expected = {i: count * math.exp(v) for i, v in Reference(logits[0].tolist(), one, None).logprobs().items()}
    assert set(drawn) <= set(expected)
    large = [i for i in expected if expected[i] >= 5]
    statistic = sum((drawn[i] - expected[i]) ** 2 / expected[i] for i in large)
    k = max(1, len(large) - 1)
    score = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    assert score < 4


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("shape", ["noise", "flat", "peaked", "steep"])
def test_few_contenders_hold_the_winner(temperature: float, shape: str) -> None:
    """The bound leaves out only tokens that lose: the same winner as with all Gumbel values, on every kind of row."""
    width = 3_001
    noise = torch.randn(1, width, generator=torch.Generator().manual_seed(5))
    logits = {
        "noise": noise * 3,
        "flat": torch.zeros(1, width),
        "peaked": noise.index_fill(1, torch.tensor([70]), 25.0),
        "steep": -torch.arange(width).float().unsqueeze(0) / 3,
    }[shape]
    rows = [sequence(params(temperature=temperature), seed) for seed in range(60)]
    found = tokens_of(Sampler(width, (), ()).sample(logits, rows, [0] * len(rows)))
    peak, scores = float(logits.max()), logits[0].tolist()
    for row, token in zip(rows, found, strict=True):
        key = stream_key(row.seed, 0, 0)
        perturbed = [(x - peak) / temperature + gumbel(gap_of(hash_token(key, i))) for i, x in enumerate(scores)]
        assert token == perturbed.index(max(perturbed))


def test_invalid_ids_are_never_produced_nor_listed() -> None:
    """Rows of the vocabulary that the tokenizer does not know: not at temperature 2, not with +100 on them."""
    logits = torch.zeros(1, VOCAB)
    logits[:, list(INVALID)] = 50.0
    p = params(temperature=2.0, logit_bias=dict.fromkeys(INVALID, 100.0), logprobs=True, top_logprobs=20)
    wanted = [
        p,
        replace(p, logprobs_mode="processed"),
        replace(p, top_p=0.9),
        replace(p, top_k=30),
        replace(p, temperature=0.0),
    ]
    for q in wanted:
        for result in PLAIN.sample(logits, [sequence(q, seed) for seed in range(300)], [0] * 300):
            assert isinstance(result, Sampled)
            assert result.token_id not in INVALID
            assert not {i for i, _ in result.top} & set(INVALID)
    # raw is over the whole vocabulary of the model all the same
    assert result.logprob == pytest.approx(float(torch.log_softmax(logits[0].double(), -1)[0]))


def test_end_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[:, [2, 3, 5]] = 30.0
    p = params(temperature=0.0, min_tokens=2, stop_token_ids=(5,))
    found = [tokens_of(PLAIN.sample(logits, [sequence(p, output=[1] * n)]))[0] for n in range(4)]
    assert found == [0, 0, 2, 2]


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, REAL)
    logits[:, [150_000, 77_777, 99_999]] = 1.0
    sampler = Sampler(REAL, (), ())
    for p in (params(temperature=0.0), params(top_k=1), params(top_p=0.0), params(temperature=1e-300, top_k=1)):
        assert tokens_of(sampler.sample(logits, [sequence(p, 3)])) == [77_777]


def test_raw_logprobs_are_log_softmax() -> None:
    logits = torch.randn(4, REAL, generator=torch.Generator().manual_seed(6)) * 4
    rows = [sequence(params(temperature=0.0, logprobs=True, top_logprobs=20, logit_bias={7: -100.0}))] * 4
    expected = torch.log_softmax(logits.double(), -1)
    for i, result in enumerate(Sampler(REAL, (), ()).sample(logits, rows)):
        assert isinstance(result, Sampled)
        best = expected[i].topk(20)
        assert [t for t, _ in result.top] == best.indices.tolist()
        assert [v for _, v in result.top] == pytest.approx(best.values.tolist(), abs=1e-7)
        assert result.logprob == result.top[0][1]


def test_nothing_of_probability_zero_is_listed() -> None:
    """Fewer entries than asked rather than filler: OpenAI's reference allows it."""
    logits = torch.zeros(1, VOCAB)
    logits[:, 0] = -INF
    p = params(top_k=2, logprobs=True, top_logprobs=5, logprobs_mode="processed")
    (result,) = PLAIN.sample(logits, [sequence(p)])
    assert isinstance(result, Sampled)
    assert result.top == ((1, math.log(0.5)), (2, math.log(0.5)))
    (raw,) = PLAIN.sample(logits, [sequence(replace(p, logprobs_mode="raw", top_logprobs=20))])
    assert isinstance(raw, Sampled)
    assert [i for i, _ in raw.top] == [1, 2, 3, 4, 5, 6, *range(8, 22)]
    (plain,) = PLAIN.sample(logits, [sequence(params())])
    assert isinstance(plain, Sampled)
    assert (plain.logprob, plain.top) == (None, ())


@pytest.mark.parametrize("value", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize(
    "p", [params(), params(temperature=0.0), params(top_p=0.5, logprobs=True)], ids=["draw", "greedy", "top_p"]
)
def test_a_faulty_row_fails_alone(value: float, p: SamplingParams) -> None:
    """Logits that are not finite, and a request that bans everything, end one row, not the batch."""
    good = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(7))
    logits = good.clone()
    logits[1, :] = value if value == -INF else logits[1, :]
    logits[1, 39] = value  # even in a padding row
    ban_all = params(logit_bias=dict.fromkeys(range(VOCAB), -100.0))
    rows = [sequence(p, 1), sequence(p, 2), sequence(ban_all, 3), sequence(p, 4)]
    expected = PLAIN.sample(good, [rows[0], rows[3]], [0, 3])
    first, fault, banned, last = PLAIN.sample(logits, rows)
    assert [first, last] == expected
    assert isinstance(fault, NumericalFault)
    assert isinstance(banned, InvalidParameter)
    assert (banned.param, banned.code) == ("logit_bias", "no_token_left")
    assert [type(r) for r in PLAIN.sample(logits[1:2], [rows[1]])] == [NumericalFault]


def test_a_mask_holds_beside_a_row_that_fails() -> None:
    """The rows that are left are sampled again: each with its own mask, and with its own row of logits."""
    logits = torch.zeros(3, VOCAB)
    logits[0] = math.nan
    logits[1, 30], logits[2, 31] = 9.0, 9.0
    allowed = np.ones((3, VOCAB), dtype=np.bool_)
    allowed[1] = allowed[2] = False
    allowed[1, 9] = allowed[2, 11] = True
    fault, one, two = PLAIN.sample(logits, [sequence(params(), seed) for seed in range(3)], allowed=packed(allowed))
    assert isinstance(fault, NumericalFault)
    assert tokens_of([one, two]) == [9, 11]


def test_a_grammar_has_the_last_word() -> None:
    """No bias lifts a token that the grammar forbids; what it allows is drawn as if there were nothing else."""
    allowed = np.zeros((2, VOCAB), dtype=np.bool_)
    allowed[0, [4, 9]] = True
    allowed[1, [11]] = True
    p = params(logit_bias={20: 100.0}, logprobs=True, logprobs_mode="processed", top_logprobs=5)
    for seed in range(50):
        one, two = PLAIN.sample(
            torch.zeros(2, VOCAB), [sequence(p, seed), sequence(params(temperature=0.0))], allowed=packed(allowed)
        )
        assert isinstance(one, Sampled)
        assert one.top == ((4, math.log(0.5)), (9, math.log(0.5)))
        assert tokens_of([one, two])[0] in (4, 9)
        assert tokens_of([one, two])[1] == 11


def test_empty_batch_and_impossible_vocabularies() -> None:
    assert PLAIN.sample(torch.zeros(0, VOCAB), []) == []
    with pytest.raises(ValueError, match="1048576"):
        Sampler(2**20 + 1, (), ())
    with pytest.raises(ValueError, match="none of the 3"):
        Sampler(3, (0, 1, 2), ())


def test_prompts_are_remembered_within_bounds() -> None:
    """A thousand requests with repetition_penalty must not leave a thousand prompts behind."""
    logits = torch.zeros(1, VOCAB)
    sampler = Sampler(VOCAB, INVALID, END)
    p = params(temperature=0.0, repetition_penalty=2.0, logit_bias={5: 1.0, 6: 0.9})
    for i in range(1_000):
        prompt = (5, 8 + i % 20) if i % 2 else (6, 8 + i % 20)
        assert tokens_of(sampler.sample(logits, [sequence(p, prompt=prompt)])) == [6 if i % 2 else 5]
    assert len(sampler._prompts) <= 64


@pytest.mark.gpu
def test_same_on_cuda_as_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    logits = torch.randn(22, 4_099, generator=torch.Generator().manual_seed(9)) * 3
    here, there = Sampler(4_099, (7,), (2,)), Sampler(4_099, (7,), (2,), "cuda")
    assert tokens_of(here.sample(logits, crowd(22))) == tokens_of(there.sample(logits.cuda(), crowd(22)))

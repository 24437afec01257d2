"""Everybody is served, nothing is lost, the budget holds; all of it without a model."""

from __future__ import annotations

import random
from itertools import groupby

import pytest
from hypothesis import given, settings, strategies as st

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.schedule import Schedule
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceState
from engine.types.sampling_params import SamplingParams


def _request(name: str, prompt: list[int], max_tokens: int = 4, n: int = 1, group: str = "") -> list[Sequence]:
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return [Sequence(name, i, tuple(prompt), params, seed=0, group=group) for i in range(n)]


def _scheduler(
    blocks: int = 64, size: int = 4, *, running: int = 8, budget: int = 32, whole: bool = False
) -> Scheduler:
    pool = BlockPool(blocks, size, caching=not whole)
    return Scheduler(pool, max_sequences=running, max_batch_tokens=budget, whole_prompts=whole)


def _sample(scheduler: Scheduler, schedule: Schedule, draw: random.Random) -> None:
    """Play the engine: note the step, append a token for each draw while drafts are right, let the finished go."""
    schedule.check()
    scheduler.commit(schedule)
    for sequence, draws in groupby(schedule.draws, lambda drawn: drawn.sequence):
        drawn = list(draws)
        for number in range(draw.randrange(len(drawn)) + 1):
            if number:
                scheduler.accept(sequence, 1)
            sequence.append(draw.randrange(3))
            if sequence.position == sequence.params.max_tokens:
                scheduler.finish(sequence)
                break
    for score in schedule.scores:
        score.sequence.next_scored = score.position + 1
    scheduler.settle_drafts(schedule)


def test_a_long_prompt_is_cut_and_does_not_stop_the_others_from_decoding() -> None:
    scheduler = _scheduler(budget=10)
    scheduler.add(_request("short", [1, 2], max_tokens=50))
    _sample(scheduler, scheduler.schedule(), random.Random(0))
    scheduler.add(_request("long", list(range(25))))
    counts = []
    for _ in range(3):
        schedule = scheduler.schedule()
        counts.append([(c.sequence.request_id, c.start, c.count, c.samples) for c in schedule.chunks])
        _sample(scheduler, schedule, random.Random(0))
    assert counts == [
        [("short", 2, 1, True), ("long", 0, 9, False)],
        [("short", 3, 1, True), ("long", 9, 9, False)],
        [("short", 4, 1, True), ("long", 18, 7, True)],
    ]


@pytest.mark.parametrize("budget", [1, 3, 1000])
def test_a_budget_smaller_than_the_crowd_still_serves_everybody(budget: int) -> None:
    scheduler = _scheduler(budget=budget)
    for i in range(12):
        scheduler.add(_request(f"r{i}", [i] * 9))
    steps = 0
    while scheduler.has_work:
        _sample(scheduler, scheduler.schedule(), random.Random(1))
        scheduler.check()
        steps += 1
        assert steps < 2000
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_the_second_request_with_a_prefix_computes_only_the_rest() -> None:
    scheduler = _scheduler()
    prompt = list(range(11))
    for name in ("first", "second"):
        scheduler.add(_request(name, prompt, max_tokens=1))
        schedule = scheduler.schedule()
        [chunk] = schedule.chunks
        _sample(scheduler, schedule, random.Random(0))
    # two full blocks of four by reference, two tokens of the tail by copy, the last one computed for its logits
    assert (chunk.start, chunk.count) == (10, 1)
    assert len(schedule.copies) == 1
    assert chunk.sequence.num_cached == 10


def test_a_follow_up_turn_reuses_what_was_generated() -> None:
    scheduler = _scheduler()
    [sequence] = _request("turn 1", [9, 8, 7], max_tokens=6)
    scheduler.add([sequence])
    while scheduler.has_work:
        _sample(scheduler, scheduler.schedule(), random.Random(3))
    follow_up = [9, 8, 7, *sequence.output_token_ids, 5, 5]
    scheduler.add(_request("turn 2", follow_up))
    [chunk] = scheduler.schedule().chunks
    assert chunk.start == 3 + 6 - 1  # all that has been computed: the last token of an answer never is


def test_choices_share_the_prompt_and_copy_its_last_block_when_they_write() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("n", list(range(6)), n=3, max_tokens=3))
    schedule = scheduler.schedule()
    [chunk] = schedule.chunks
    assert [s.choice_index for s in chunk.forks] == [1, 2]
    tables = [s.block_table for s in (chunk.sequence, *chunk.forks)]
    assert tables[0] == tables[1] == tables[2]
    _sample(scheduler, schedule, random.Random(0))
    copies = scheduler.schedule().copies
    assert len(copies) == 2, "the last of three may write in place"
    tails = [s.block_table[1] for s in (chunk.sequence, *chunk.forks)]
    assert len(set(tails)) == 3
    scheduler.check()


def test_more_choices_than_places_wait_for_their_turn() -> None:
    scheduler = _scheduler(running=2)
    scheduler.add(_request("n", list(range(6)), n=5, max_tokens=2))
    done = 0
    while scheduler.has_work:
        schedule = scheduler.schedule()
        assert len(scheduler.running) <= 2
        _sample(scheduler, schedule, random.Random(0))
        scheduler.check()
        done += 1
        assert done < 100


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    scheduler = _scheduler(blocks=6, size=2, budget=64)
    scheduler.add(_request("old", [1, 2, 3], max_tokens=8))
    scheduler.add(_request("young", [4, 5, 6], max_tokens=8))
    scheduler.add(_request("waiting", [7], max_tokens=2))
    while scheduler.num_preemptions == 0:
        _sample(scheduler, scheduler.schedule(), random.Random(0))
        scheduler.check()
    assert scheduler.waiting[0].request_id == "young"
    assert scheduler.waiting[0].output_token_ids, "its tokens stay, only the keys go"
    while scheduler.has_work:
        _sample(scheduler, scheduler.schedule(), random.Random(0))
        scheduler.check()


def test_an_undone_step_is_recomputed_from_the_start() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", list(range(9)), n=2))
    schedule = scheduler.schedule()
    scheduler.rollback(schedule)
    scheduler.check()
    assert [s.choice_index for s in scheduler.waiting] == [0, 1]
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    while scheduler.has_work:
        _sample(scheduler, scheduler.schedule(), random.Random(0))


def test_whole_prompts_are_never_cut_and_admitted_only_with_room_for_their_worst_case() -> None:
    scheduler = _scheduler(blocks=8, size=2, budget=3, whole=True)
    scheduler.add(_request("a", list(range(7)), max_tokens=3))
    scheduler.add(_request("b", list(range(7)), max_tokens=3))
    schedule = scheduler.schedule()
    assert [(c.start, c.count) for c in schedule.chunks] == [(0, 7)]  # b's worst case does not fit beside a's
    seen = []
    while scheduler.has_work:
        _sample(scheduler, schedule, random.Random(0))
        schedule = scheduler.schedule()
        seen += [(c.sequence.request_id, c.count) for c in schedule.chunks]
    assert ("b", 7) in seen
    assert scheduler.num_preemptions == 0


def _admissions(scheduler: Scheduler, steps: int, later: dict[int, list[list[Sequence]]] | None = None) -> list[str]:
    """The order in which requests begin to be computed; `later`: what comes at which step."""
    order: list[str] = []
    for step in range(steps):
        for request in (later or {}).get(step, ()):
            scheduler.add(request)
        schedule = scheduler.schedule()
        order += [c.sequence.request_id for c in schedule.chunks if c.start == 0 and c.sequence.request_id not in order]
        _sample(scheduler, schedule, random.Random(0))
    return order


@pytest.mark.parametrize("whole", [False, True])
def test_two_hundred_requests_of_one_group_do_not_keep_another_waiting(whole: bool) -> None:
    scheduler = _scheduler(blocks=800, running=2, budget=1000, whole=whole)
    for number in range(200):
        scheduler.add(_request(f"a{number}", [number], group="a"))
    order = _admissions(scheduler, 420, {20: [_request("b0", [7], group="b")], 24: [_request("b1", [8], group="b")]})
    mine = [name for name in order if name.startswith("a")]
    assert mine == [f"a{number}" for number in range(200)], "within a group: in order of arrival"
    before = order.index("b0")
    assert order.index("b1") - before <= 5
    assert before <= 2 * 20 / 4 + 3, "after what was running when it came"


def test_groups_take_turns() -> None:
    scheduler = _scheduler(blocks=800, running=1, budget=1000)
    for group in "abc":
        for number in range(5):
            scheduler.add(_request(f"{group}{number}", [number], max_tokens=1, group=group))
    assert _admissions(scheduler, 40) == [f"{group}{number}" for number in range(5) for group in "abc"]


def test_who_was_away_has_saved_no_turns() -> None:
    scheduler = _scheduler(blocks=800, running=1, budget=1000)
    for number in range(6):
        scheduler.add(_request(f"a{number}", [number], max_tokens=1, group="a"))
    late = [_request(f"b{number}", [number], max_tokens=1, group="b") for number in range(3)]
    assert _admissions(scheduler, 20, {3: late}) == ["a0", "a1", "a2", "b0", "a3", "b1", "a4", "b2", "a5"]


def _prefilled(scheduler: Scheduler, *prompts: list[int], max_tokens: int = 50) -> list[Sequence]:
    """Sequences whose prompts are computed and whose first token is drawn."""
    made = [_request(f"r{i}", prompt, max_tokens)[0] for i, prompt in enumerate(prompts)]
    for sequence in made:
        scheduler.add([sequence])
    while any(not sequence.position for sequence in made):
        _sample(scheduler, scheduler.schedule(), random.Random(0))
    return made


def _planned(schedule: Schedule) -> list[tuple[str, int, int]]:
    return [(c.sequence.request_id, c.start, c.count) for c in schedule.chunks]


def test_the_token_budget_is_spent_in_order_of_turn_and_not_exceeded() -> None:
    scheduler = _scheduler(budget=10)
    for name, length in (("a", 4), ("b", 3), ("c", 8), ("d", 2)):
        scheduler.add(_request(name, list(range(ord(name), ord(name) + length))))
    assert _planned(scheduler.schedule()) == [("a", 0, 4), ("b", 0, 3), ("c", 0, 3)]


def test_a_decode_runs_although_a_prompt_before_it_has_spent_the_budget() -> None:
    scheduler = _scheduler(budget=4)
    [long], [short] = _request("long", list(range(40))), _request("short", [7], max_tokens=9)
    scheduler.add([long])
    _sample(scheduler, scheduler.schedule(), random.Random(0))
    scheduler.add([short])
    _sample(scheduler, scheduler.schedule(held=[long]), random.Random(0))
    assert _planned(scheduler.schedule()) == [("long", 4, 3), ("short", 1, 1)]


def test_a_waiting_request_that_is_aborted_leaves_the_others_in_their_order() -> None:
    scheduler = _scheduler(running=1)
    requests = [_request(name, [i])[0] for i, name in enumerate("abcd")]
    for sequence in requests:
        scheduler.add([sequence])
    scheduler.finish(requests[2])
    scheduler.finish(requests[2])  # once more is nothing
    assert requests[2].state is SequenceState.FINISHED
    assert [s.request_id for s in scheduler.waiting] == ["a", "b", "d"]


def _five_six_seven(_: Sequence, most: int) -> tuple[int, ...]:
    return (5, 6, 7)[:most]


def _step(scheduler: Scheduler, draft: tuple[int, ...]) -> Schedule:
    """A step in which every draft token is right, and token 7 is drawn behind them."""
    schedule = scheduler.schedule(propose=lambda _, most: draft[:most])
    schedule.check()
    scheduler.commit(schedule)
    for chunk in schedule.chunks:
        if chunk.samples:
            for token in (*chunk.draft, 7):
                chunk.sequence.append(token)
            scheduler.accept(chunk.sequence, len(chunk.draft))
    return schedule


def test_draft_tokens_are_taken_from_the_budget_and_one_block_is_left_for_each_other_sequence() -> None:
    scheduler = _scheduler(blocks=64, size=4, budget=5)
    one, two = _prefilled(scheduler, [1, 2], [3, 4])
    schedule = scheduler.schedule(propose=_five_six_seven)
    assert [c.draft for c in schedule.chunks] == [(5, 6, 7), ()], "five tokens: two decodes and three drafts"
    assert [c.tokens for c in schedule.chunks] == [[one.token(2), 5, 6, 7], [two.token(2)]]
    scheduler = _scheduler(blocks=4, size=4)
    one, two = _prefilled(scheduler, [1, 2], [3, 4])
    schedule = scheduler.schedule(propose=_five_six_seven)
    assert [c.draft for c in schedule.chunks] == [(5,), (5,)], "of two free blocks each may need one"
    scheduler = _scheduler(blocks=5, size=4)
    [one, _] = _prefilled(scheduler, [1, 2], [3, 4])
    schedule = scheduler.schedule(propose=_five_six_seven)
    assert [c.draft for c in schedule.chunks] == [(5, 6, 7), (5,)], "and the fifth is to spare"


def test_a_right_draft_token_counts_as_computed() -> None:
    scheduler = _scheduler()
    [sequence] = _prefilled(scheduler, [1, 2])
    schedule = scheduler.schedule(propose=_five_six_seven)
    scheduler.commit(schedule)
    assert sequence.num_computed == 3
    for token in (5, 6, 9):
        sequence.append(token)
    scheduler.accept(sequence, 2)
    assert sequence.num_computed == 5
    assert _planned(scheduler.schedule()) == [("r0", 5, 1)]


def test_a_draft_goes_behind_the_last_chunk_of_a_prompt_and_is_cut_to_rows_and_budget() -> None:
    scheduler = _scheduler(blocks=64, size=4, budget=8)
    scheduler.max_rows = 5
    scheduler.add(_request("a", list(range(10)), 30))
    long = tuple(range(100))
    first, second, third = (_step(scheduler, long) for _ in range(3))
    assert [(c.start, c.count, c.draft, c.num_rows) for c in first.chunks] == [(0, 8, (), 0)]
    assert [(c.start, c.count, c.draft, c.num_rows) for c in second.chunks] == [(8, 7, long[:5], 6)]
    assert [(c.start, c.count, c.draft, c.num_rows) for c in third.chunks] == [(15, 1 + 5, long[:5], 6)]


def test_prompts_come_before_drafts() -> None:
    """However long a draft is, a prompt that waits is computed as if there were none."""
    scheduler = _scheduler(blocks=64, size=4, budget=8)
    [old] = _prefilled(scheduler, [1, 2], max_tokens=99)
    scheduler.add(_request("new", list(range(20))))
    counts = []
    for _ in range(3):
        schedule = scheduler.schedule(propose=lambda _, most: (9,) * most)
        counts.append([(c.sequence is old, c.count - len(c.draft), len(c.draft)) for c in schedule.chunks])
        _sample(scheduler, schedule, random.Random(1))
    assert [[(own, real) for own, real, _ in step] for step in counts] == [[(True, 1), (False, 7)]] * 2 + [
        [(True, 1), (False, 6)]
    ]
    assert [sum(draft for *_, draft in step) for step in counts] == [0, 0, 1]


def test_a_draft_is_never_longer_than_the_reply_may_be() -> None:
    scheduler = _scheduler(blocks=64, size=4, budget=50)
    scheduler.add(_request("a", [1, 2, 3], 4))
    schedule = scheduler.schedule(propose=lambda _, most: tuple(range(most)))
    assert [c.draft for c in schedule.chunks] == [(0, 1, 2)], "the fourth token is drawn behind it"


def test_a_prompt_with_choices_that_wait_for_it_is_followed_by_no_draft() -> None:
    scheduler = _scheduler(blocks=64, size=4, budget=50)
    scheduler.add(_request("a", [1, 2, 3], 9, 2))
    assert [c.draft for c in scheduler.schedule(propose=_five_six_seven).chunks] == [()]


def test_blocks_of_a_wrong_draft_are_given_back() -> None:
    scheduler = _scheduler(blocks=64, size=4, budget=60)
    [sequence] = _prefilled(scheduler, [1, 2])
    schedule = scheduler.schedule(propose=lambda _, most: tuple(range(min(most, 40))))
    assert len(sequence.block_table) > 2
    scheduler.commit(schedule)
    sequence.append(99)
    scheduler.settle_drafts(schedule)
    assert len(sequence.block_table) == 2
    scheduler.check()


def test_a_scored_prompt_is_computed_again_where_its_logits_are_wanted_and_in_chunks_of_rows() -> None:
    scheduler = _scheduler(blocks=64, size=4, budget=50)
    _prefilled(scheduler, list(range(20)))
    for sequence in list(scheduler.running):
        scheduler.finish(sequence)
    scheduler.max_rows = 6
    [scored] = _request("b", list(range(20)), 5)
    scored.next_scored = 1
    scheduler.add([scored])
    positions: list[int] = []
    while not scored.position:
        schedule = scheduler.schedule()
        schedule.check()
        [chunk] = schedule.chunks
        assert chunk.num_rows <= 6
        positions += [score.position for score in schedule.scores]
        scheduler.commit(schedule)
        scored.next_scored = positions[-1] + 1
        if schedule.draws:
            scored.append(1)
        elif len(positions) == 12:
            scheduler._preempt(scored)
    assert positions == list(range(1, 20)), "each once, in order, whatever was preempted"


def test_the_oldest_goes_on_in_the_very_step_in_which_the_youngest_is_preempted() -> None:
    scheduler = _scheduler(blocks=3, size=2)
    old, young = _prefilled(scheduler, [1, 2], [3], max_tokens=4)
    assert (len(old.block_table), len(young.block_table), scheduler.num_preemptions) == (1, 1, 0)
    seen: list[list[str]] = []
    while scheduler.num_preemptions == 0:
        schedule = scheduler.schedule()
        seen.append([c.sequence.request_id for c in schedule.chunks])
        _sample(scheduler, schedule, random.Random(0))
    assert seen[-1] == ["r0"]
    assert young.state is SequenceState.WAITING


def test_every_preemption_is_counted_and_nobody_is_admitted_in_its_step() -> None:
    scheduler = _scheduler(blocks=3, size=2)
    _prefilled(scheduler, [1, 2], [3], max_tokens=4)
    [hungry] = _request("hungry", [9], max_tokens=1)
    scheduler.add([hungry])
    counts = [scheduler.num_preemptions]
    for _ in range(12):
        schedule = scheduler.schedule()
        if scheduler.num_preemptions > counts[-1]:
            assert all(c.start or c.sequence.request_id == "r0" for c in schedule.chunks)
        counts.append(scheduler.num_preemptions)
        _sample(scheduler, schedule, random.Random(0))
    assert counts == sorted(counts)
    sequences = [_request(f"n{i}", [i, i], max_tokens=3)[0] for i in range(2)]
    for sequence in sequences:
        scheduler.add([sequence])
    before = scheduler.num_preemptions
    scheduler.rollback(scheduler.schedule())
    assert scheduler.num_preemptions == before + 2


def test_a_shared_block_is_copied_also_when_its_place_comes_from_a_preemption() -> None:
    """Two choices share the prompt's last block, and the youngest request goes so that one of them gets its own."""
    scheduler = _scheduler(blocks=2, size=4)
    [first, second] = _request("n", [1, 2], n=2, max_tokens=2)
    scheduler.add([first, second])
    _sample(scheduler, scheduler.schedule(), random.Random(0))
    [young] = _request("young", [9], max_tokens=3)
    scheduler.add([young])
    _sample(scheduler, scheduler.schedule(held=[first, second]), random.Random(0))
    assert first.block_table == second.block_table
    schedule = scheduler.schedule()
    assert young.state is SequenceState.WAITING
    assert len(schedule.copies) == 1
    assert first.block_table != second.block_table
    scheduler.check()


def test_check_names_the_damage() -> None:
    """The random walks find nothing that `check` does not see."""
    for change, told in [
        (lambda s, one: setattr(one, "num_computed", len(one)), "nothing is left to compute"),
        (lambda s, one: one.block_table.clear(), ""),
        (lambda s, one: s.pool.reuse(one.block_table[0]), "references are lost"),
        (lambda s, one: setattr(one, "state", SequenceState.WAITING), ""),
        (lambda s, one: s.waiting.append(one), ""),
        (lambda s, one: setattr(s, "max_sequences", 0), ""),
    ]:
        scheduler = _scheduler()
        [sequence] = _prefilled(scheduler, [1, 2, 3])
        scheduler.check()
        change(scheduler, sequence)
        with pytest.raises(AssertionError, match=f"^{told}"):
            scheduler.check()


def test_the_keys_of_a_failed_step_serve_nobody() -> None:
    for reusable in (True, False):
        scheduler = _scheduler(size=4)
        [sequence] = _prefilled(scheduler, [1, 2, 3, 4, 5, 6])
        scheduler.finish(sequence, reusable=reusable)
        match = scheduler.pool.match([1, 2, 3, 4, 5, 6, 7], 6)
        assert (len(match.blocks), match.tail_tokens) == (1, 2 if reusable else 0)


def test_sequences_grow_in_consecutive_blocks_also_after_others_have_gone() -> None:
    """Attention copies what is not consecutive: a finished sequence must leave no claim on the place it had."""
    scheduler = _scheduler(blocks=16, size=1)
    for _ in range(3):
        pair = _prefilled(scheduler, [1], [2], max_tokens=6)
        while all(sequence.position < 5 for sequence in pair):
            _sample(scheduler, scheduler.schedule(), random.Random(0))
        for sequence in pair:
            table = sequence.block_table
            assert table == list(range(table[0], table[0] + len(table)))
            scheduler.finish(sequence)
        scheduler.pool.clear_cache()


def _reserve(scheduler: Scheduler, sequences: list[Sequence]) -> None:
    """Take blocks ahead of time: all that are asked for, unread by others and without anybody's loss, or none."""
    before = {id(s): list(s.block_table) for s in scheduler.running}
    free, size = scheduler.pool.num_free, scheduler.pool.block_size
    if not scheduler.reserve_next(sequences):
        assert scheduler.pool.num_free == free
        assert all(s.block_table == before[id(s)] for s in scheduler.running)
        return
    assert scheduler.pool.num_free >= min(free, len(scheduler.running))
    for sequence in sequences:
        table = sequence.block_table
        assert table[: len(before[id(sequence)])] == before[id(sequence)]
        assert scheduler.pool.references(table[len(sequence) // size]) == 1


def test_blocks_for_the_next_token_are_taken_ahead_only_where_nobody_loses_by_it() -> None:
    scheduler = _scheduler(blocks=4, size=4)
    scheduler.add(_request("one", [1, 2, 3, 4], 9))
    schedule = scheduler.schedule()
    [sequence] = scheduler.running
    assert len(sequence.block_table) == 1
    assert scheduler.reserve_next([sequence])
    assert len(sequence.block_table) == 2
    assert scheduler.reserve_next([sequence]), "it has it already"
    assert len(sequence.block_table) == 2
    _sample(scheduler, schedule, random.Random(0))
    hog = scheduler.pool.allocate(2, "a hog")
    while len(sequence) % 4:
        _sample(scheduler, scheduler.schedule(), random.Random(0))
    assert not scheduler.reserve_next([sequence])
    scheduler.pool.release(hog, "a hog")
    assert scheduler.reserve_next([sequence])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(4, 24), st.integers(1, 5), st.integers(1, 6), st.integers(1, 20))
def test_random_walk(draw: random.Random, blocks: int, size: int, running: int, budget: int) -> None:
    """Requests come, are aborted, finish, are preempted and undone; every invariant holds after every step."""
    scheduler = _scheduler(blocks, size, running=running, budget=budget)
    scheduler.max_rows = draw.choice((1, 3, 40))
    capacity = blocks * size
    alive: list[list[Sequence]] = []
    for number in range(60):
        if draw.random() < 0.4:
            length = draw.randrange(1, capacity)
            prompt = [draw.randrange(2) for _ in range(length)]
            request = _request(
                f"r{number}", prompt, draw.randrange(1, min(capacity - length, 9) + 1), draw.randrange(1, 4),
                group=draw.choice("abc"),
            )  # fmt: skip
            request[0].next_scored = draw.choice((len(prompt), len(prompt), 1))
            scheduler.add(request)
            alive.append(request)
        if alive and draw.random() < 0.1:
            for sequence in alive.pop(draw.randrange(len(alive))):
                scheduler.finish(sequence)
        schedule = scheduler.schedule(
            propose=lambda _, most: tuple(draw.randrange(3) for _ in range(min(most, draw.choice((0, 0, 1, 2, 4, 30)))))
        )
        sizes = [c.count - len(c.draft) for c in schedule.chunks if c.count - len(c.draft) > 1]
        assert sum(sizes) <= max(budget, 1)
        assert len({id(c.sequence) for c in schedule.chunks}) == len(schedule.chunks)
        if draw.random() < 0.5:
            _reserve(scheduler, [drawn.sequence for drawn in schedule.draws if not drawn.draft])
            scheduler.check()
        if draw.random() < 0.05:
            scheduler.rollback(schedule)
        else:
            _sample(scheduler, schedule, draw)
        scheduler.check()
    steps = 0
    while scheduler.has_work:
        _sample(scheduler, scheduler.schedule(), draw)
        scheduler.check()
        steps += 1
        assert steps < 5000, "somebody waits for ever"
    assert all(s.state is SequenceState.FINISHED for r in alive for s in r)
    assert scheduler.pool.num_free == blocks

"""Chooses which sequences run in the next step, and which of their tokens. Pure: no tensor, no clock, no thread.

    waiting ──schedule──▶ running ──finish / abort──▶ gone
       ▲                     │
       └──────preempt────────┘        (by recomputation: the blocks go, the tokens stay)

Every running sequence with one uncomputed token decodes in every step. The rest of the token budget goes to prompts, in
fair order, cut into chunks. By the law none of these choices changes a bit of any reply.

Groups (API keys) are served by start-time fair queueing over requests (Goyal, Vin and Cheng, 1996): a request's start
tag is one more than that of its group's last request, but not below the tag that is being served. So a group with many
waiting requests gets one of them served for each request of the other groups, and a newcomer waits for none of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Final

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.schedule import Chunk, Schedule
from engine.scheduling.sequence import Sequence, SequenceState

MOST_ROWS: Final = 512
"""Rows of logits of one step beside one for each sequence. More make no step faster."""

Propose = Callable[[Sequence, int], tuple[int, ...]]
"""Proposes draft tokens for a sequence, at most as many as the second argument says."""


@dataclass(slots=True)
class _Budget:
    """What is left of a step.

    Attributes:
        tokens: prompt and draft tokens.
        rows: rows of logits for draft tokens and for prompt tokens that are scored.
    """

    tokens: int
    rows: int


class Scheduler:
    """Decides admission, token budget, chunked prefill and preemption.

    Args:
        pool: where blocks come from. The scheduler owns every sequence's block table.
        max_sequences: sequences that run at once.
        max_batch_tokens: prompt, draft and decode tokens of one step. Decodes are never cut; a prompt always gets one
            token.
        max_rows: rows of logits of one step beside one for each sequence: those of draft tokens and of prompt tokens
            that are scored. A row holds one float32 for each token of the vocabulary.
        whole_prompts: for a runner with caches of its own. A prompt is computed in one piece, nothing is shared or
            preempted, and a sequence is admitted once its longest possible reply fits.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        max_batch_tokens: int,
        max_rows: int = MOST_ROWS,
        whole_prompts: bool = False,
    ) -> None:
        self.pool = pool
        self.max_sequences = max_sequences
        self.max_batch_tokens = max_batch_tokens
        self.max_rows = max_rows
        self.whole_prompts = whole_prompts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission: the last is the first to be preempted
        self.num_preemptions = 0
        self._served = 0  # the largest start tag that was admitted
        self._last_tags: dict[str, int] = {}  # the start tag of each group's last request

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequences: list[Sequence]) -> None:
        """Queue all choices of one request: the first computes the prompt, the others wait to fork from it."""
        leader, *siblings = sequences
        tag = max(self._served, self._last_tags.get(leader.group, self._served - 1) + 1)
        self._last_tags = {group: last for group, last in self._last_tags.items() if last > self._served}
        self._last_tags[leader.group] = tag
        for sequence in sequences:
            sequence.start_tag = tag
        if not self.whole_prompts:
            leader.siblings = siblings
            sequences = [leader]
        at = len(self.waiting)
        while at and self.waiting[at - 1].start_tag > tag:
            at -= 1
        for sequence in reversed(sequences):
            self.waiting.insert(at, sequence)

    def finish(self, sequence: Sequence, *, reusable: bool = True) -> None:
        """Remove a sequence, running or waiting, and free its blocks. Does nothing if it is gone already.

        `reusable`: its last, partly filled block may serve later prompts.
        """
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.state is SequenceState.RUNNING:
            if reusable:
                self._register_full_blocks(sequence)
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        self._release(sequence, keep_tail=reusable)

    # -- one step -----------------------------------------------------------------------------------------------

    def schedule(self, held: Container[Sequence] = (), propose: Propose | None = None) -> Schedule:
        """Choose the next step's chunks and allocate the blocks that they write to.

        Args:
            held: sequences to leave out.
            propose: is asked for a draft wherever decodes and prompts have left room for one.
        """
        schedule = Schedule()
        decoding = sum(s.num_uncomputed == 1 for s in self.running)
        budget = _Budget(max(self.max_batch_tokens - decoding, 1), self.max_rows)
        preemptions = self.num_preemptions
        for sequence in list(self.running):
            if sequence in held or sequence.state is not SequenceState.RUNNING:
                continue  # or preempted by an older one, a moment ago
            count = sequence.num_uncomputed
            is_prompt = count > 1
            if is_prompt:
                count = self._cut(sequence, budget)
            if count and self._make_room(sequence, sequence.num_computed + count, schedule):
                budget.tokens -= count if is_prompt else 0
                self._add_chunk(sequence, count, schedule, budget)
        if self.num_preemptions == preemptions:
            self._admit(budget, schedule, held)
        if propose is not None and not self.whole_prompts:
            self._add_drafts(schedule, budget, propose)
        schedule.plan_rows()
        return schedule

    def commit(self, schedule: Schedule) -> None:
        """Note that the keys and values of a step are in the cache; full blocks become reusable."""
        for chunk in schedule.chunks:
            for sequence in (chunk.sequence, *chunk.forks):
                if sequence.state is SequenceState.RUNNING:
                    sequence.num_computed = chunk.start + chunk.count - len(chunk.draft)
                    self._register_full_blocks(sequence)

    def accept(self, sequence: Sequence, count: int) -> None:
        """Note that the next `count` draft tokens of the last step were right: their keys and values are in the
        cache."""
        if sequence.state is SequenceState.RUNNING:
            sequence.num_computed += count

    def settle_drafts(self, schedule: Schedule) -> None:
        """Make blocks of accepted draft tokens reusable, and free those of wrong ones but for one.

        If every token is computed and none was drawn behind the last one, that one is computed again for its logits.
        """
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if not chunk.draft or sequence.state is not SequenceState.RUNNING:
                continue
            sequence.num_computed = min(sequence.num_computed, len(sequence) - 1)
            self._register_full_blocks(sequence)
            keep = self.pool.blocks_for(len(sequence)) + 1
            if len(sequence.block_table) > keep:
                self.pool.release(sequence.block_table[keep:], None)
                del sequence.block_table[keep:]

    def reserve_next(self, sequences: Iterable[Sequence]) -> bool:
        """Give running sequences the blocks of one token behind their next one, before that is known.

        False, and nothing taken, if that would cost others a block or write into a block that others read.
        """
        size, missing = self.pool.block_size, []
        for sequence in sequences:
            table, number = sequence.block_table, len(sequence) // size
            if number < len(table) and self.pool.references(table[number]) > 1:
                return False
            if number >= len(table):
                missing.append(sequence)
        if len(missing) > self.pool.num_free - len(self.running):
            return False
        for sequence in missing:
            self._grow(sequence, len(sequence) + 1)
        return True

    def rollback(self, schedule: Schedule) -> None:
        """Undo a step that was not carried out: its sequences wait again and are recomputed.

        Their blocks may have been meant for copies that never happened, so nothing of this step is kept.
        """
        for chunk in reversed(schedule.chunks):
            for sequence in reversed((chunk.sequence, *chunk.forks)):
                if sequence.state is SequenceState.RUNNING:
                    self._preempt(sequence)

    # -- inside -------------------------------------------------------------------------------------------------

    def _cut(self, sequence: Sequence, budget: _Budget) -> int:
        """Return how many of a sequence's uncomputed tokens fit a step."""
        count = sequence.num_uncomputed
        if self.whole_prompts:
            return count
        if sequence.scores_prompt:  # tokens before `next_scored - 1` are computed again and need no rows
            count = min(count, max(budget.rows, 1) + max(sequence.next_scored - 1 - sequence.num_computed, 0))
        return min(count, budget.tokens)

    def _drafted(self, sequence: Sequence, length: int, budget: _Budget, propose: Propose) -> tuple[int, ...]:
        """Ask for a draft that fits, behind `length` computed tokens. No sequence is preempted for a draft."""
        left = max(self.pool.num_free - len(self.running), 0)  # others may need one block each in this very step
        space = (len(sequence.block_table) + left) * self.pool.block_size - length
        last = (sequence.params.max_tokens or 0) - sequence.generated - 1  # behind a draft one more token is drawn
        room = min(budget.tokens, budget.rows, space, last)
        draft = propose(sequence, room) if room > 0 else ()
        self._grow(sequence, length + len(draft))
        budget.tokens -= len(draft)
        budget.rows -= len(draft)
        return draft

    def _add_chunk(self, sequence: Sequence, count: int, schedule: Schedule, budget: _Budget) -> None:
        chunk = Chunk.of(sequence, count)
        if chunk.samples and sequence.siblings:
            chunk = Chunk.of(sequence, count, forks=self._fork_siblings(sequence))
        budget.rows -= max(chunk.num_rows - 1, 0)
        schedule.chunks.append(chunk)

    def _add_drafts(self, schedule: Schedule, budget: _Budget, propose: Propose) -> None:
        """Put drafts behind the chunks that reach their sequence's last token, as far as the step has room."""
        for number, chunk in enumerate(schedule.chunks):
            sequence = chunk.sequence
            if not chunk.samples or chunk.forks:  # which share its blocks, so nothing is written behind the prompt
                continue
            if sequence.state is SequenceState.RUNNING and (
                draft := self._drafted(sequence, chunk.start + chunk.count, budget, propose)
            ):
                schedule.chunks[number] = Chunk.of(sequence, chunk.count, draft=draft)

    def _fork_siblings(self, leader: Sequence) -> tuple[Sequence, ...]:
        """Start as many siblings as there is room for. The rest wait in front and will find the prompt in the cache."""
        room = self.max_sequences - len(self.running)
        forks, rest = leader.siblings[:room], leader.siblings[room:]
        leader.siblings = []
        for sequence in forks:
            sequence.block_table = self.pool.fork(leader.block_table)
            sequence.block_uids = list(leader.block_uids)
            sequence.num_computed = leader.num_computed
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
        self.waiting.extendleft(reversed(rest))
        return tuple(forks)

    def _admit(self, budget: _Budget, schedule: Schedule, held: Container[Sequence]) -> None:
        while self.waiting and budget.tokens > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if sequence in held:
                return
            if self.whole_prompts:
                if not self._reserve_worst_case(sequence):
                    return
                count = sequence.num_uncomputed
            else:
                if not self._attach_cached_prefix(sequence, schedule):
                    return
                count = self._cut(sequence, budget)
                self._grow(sequence, sequence.num_computed + count)
            self.waiting.popleft()
            self._served = max(self._served, sequence.start_tag)
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
            budget.tokens -= count
            self._add_chunk(sequence, count, schedule, budget)

    def _attach_cached_prefix(self, sequence: Sequence, schedule: Schedule) -> bool:
        """Give a waiting sequence the cached blocks of its prefix. False, and nothing taken, if the rest would not fit.

        What logits are needed of is computed again: the last token, and prompt tokens whose successors are scored.
        """
        tokens = sequence.tokens(0, len(sequence))
        most = sequence.next_scored - 1 if sequence.scores_prompt else len(tokens) - 1
        match = self.pool.match(tokens, most, sequence.share)
        needed = self.pool.blocks_for(len(sequence)) - len(match.blocks)
        revived = sum(self.pool.references(b) == 0 for b in match.blocks)
        if needed + revived > self.pool.num_free:
            return False
        for block in match.blocks:
            self.pool.reuse(block)
        sequence.block_table = list(match.blocks)
        sequence.block_uids = list(match.uids)
        sequence.num_computed = len(match.blocks) * self.pool.block_size
        if match.tail_block is not None:
            self._grow(sequence, sequence.num_computed + 1)
            schedule.copies.append((match.tail_block, sequence.block_table[-1]))
            sequence.num_computed += match.tail_tokens
        if not sequence.output_token_ids:
            sequence.num_cached = sequence.num_computed
        return True

    def _reserve_worst_case(self, sequence: Sequence) -> bool:
        worst = self.pool.blocks_for(len(sequence.prompt_token_ids) + (sequence.params.max_tokens or 1))
        if worst > self.pool.num_free:
            return False
        sequence.block_table = self.pool.allocate(worst, sequence, expected=worst)
        return True

    def _make_room(self, sequence: Sequence, length: int, schedule: Schedule) -> bool:
        """Give a running sequence blocks for `length` tokens, with no other reference to the block that it writes
        first.

        Preempts the youngest sequence while blocks are short. False if that was this sequence itself.
        """
        if self.whole_prompts:
            return True
        size, table = self.pool.block_size, sequence.block_table
        first = sequence.num_computed // size  # the block that is written first
        shared = first < len(table) and self.pool.references(table[first]) > 1
        needed = self.pool.blocks_for(length) - len(table) + shared
        if needed <= 0:
            return True  # nearly every decode
        while needed > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
            shared = first < len(table) and self.pool.references(table[first]) > 1
            needed = self.pool.blocks_for(length) - len(table) + shared
        if shared:
            assert first == len(table) - 1, "only the block after a prompt is shared and written"
            old = table.pop()
            self._grow(sequence, (first + 1) * size)
            schedule.copies.append((old, table[first]))
            self.pool.release([old], None)
        self._grow(sequence, length)
        return True

    def _grow(self, sequence: Sequence, length: int) -> None:
        table = sequence.block_table
        count = self.pool.blocks_for(length) - len(table)
        if count > 0:
            most = len(sequence.prompt_token_ids) + (sequence.params.max_tokens or 1)
            table += self.pool.allocate(
                count, sequence, after=table[-1] if table else None, expected=self.pool.blocks_for(most) - len(table)
            )

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence, keep_tail=False)
        sequence.state = SequenceState.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence, *, keep_tail: bool) -> None:
        tail = sequence.num_computed % self.pool.block_size
        full = sequence.num_computed // self.pool.block_size
        if (
            keep_tail
            and tail
            and not self.whole_prompts
            and full == len(sequence.block_uids) < len(sequence.block_table)
        ):
            parent = sequence.block_uids[-1] if sequence.block_uids else sequence.share
            tokens = sequence.tokens(sequence.num_computed - tail, sequence.num_computed)
            self.pool.register(sequence.block_table[full], parent, tuple(tokens))
        self.pool.release(sequence.block_table, sequence)
        sequence.block_table = []
        sequence.block_uids = []
        sequence.num_computed = 0

    def _register_full_blocks(self, sequence: Sequence) -> None:
        if self.whole_prompts:
            return
        size, uids = self.pool.block_size, sequence.block_uids
        for number in range(len(uids), sequence.num_computed // size):
            tokens = tuple(sequence.tokens(number * size, (number + 1) * size))
            parent = uids[-1] if uids else sequence.share
            uids.append(self.pool.register(sequence.block_table[number], parent, tokens))

    def check(self, others: Iterable[Sequence] = ()) -> None:
        """Assert every invariant, the pool's included. Tests call it after each step of their random walks."""
        self.pool.check()
        assert len(self.running) <= self.max_sequences
        references = [0] * self.pool.num_blocks
        for sequence in (*self.running, *self.waiting, *others):
            for block in sequence.block_table:
                references[block] += 1
            assert sequence.num_computed < len(sequence), "nothing is left to compute: it would wait for ever"
            assert len(sequence.block_table) >= self.pool.blocks_for(sequence.num_computed)
        assert references == [self.pool.references(b) for b in range(self.pool.num_blocks)], "references are lost"
        assert all(s.state is SequenceState.RUNNING for s in self.running)
        assert all(s.state is SequenceState.WAITING and not s.block_table for s in self.waiting)

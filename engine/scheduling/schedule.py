"""One step, as plain data: which blocks to copy, which tokens to compute, which to draw and which to score. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

from engine.scheduling.sequence import Sequence, SequenceState
from engine.types.sampling_params import SamplingParams

__all__ = ["Chunk", "Draw", "PromptScore", "Schedule"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens `start … start + count - 1` of a sequence.

    Attributes:
        samples: the last real one of them is the sequence's last token, so its logits choose the next one.
        forks: choices that share this prompt and draw their first token from the same logits.
        draft: draft tokens, the last of the tokens to compute. Each row from the last real token on chooses a token.
        num_rows: rows of logits that the forward pass returns for this chunk: those of its last tokens.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    forks: tuple[Sequence, ...] = ()
    draft: tuple[int, ...] = ()
    num_rows: int = 0

    @classmethod
    def of(
        cls, sequence: Sequence, count: int, *, forks: tuple[Sequence, ...] = (), draft: tuple[int, ...] = ()
    ) -> Chunk:
        """Plan the next `count` tokens of a sequence, and its draft behind them."""
        start, end = sequence.num_computed, sequence.num_computed + count
        samples = end == len(sequence) and sequence.params.max_tokens != 0
        rows = 1 + len(draft) if samples else 0
        if sequence.scores_prompt:  # the row of a token describes the token after it
            rows = max(end + len(draft) - max(start, sequence.next_scored - 1), 0)
        return cls(sequence, start, count + len(draft), samples, forks, draft, rows)

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute."""
        real = self.sequence.tokens(self.start, self.start + self.count - len(self.draft))
        return [*real, *self.draft]


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Describe the prompt token at `position` by the step's logits in `row`, those of the token before it."""

    sequence: Sequence
    row: int
    position: int


@dataclass(slots=True, eq=False)  # not frozen: that would double the time to make one, which every token needs
class Draw:
    """One token to draw, as it would be drawn alone. What the sampler asks of a row is what its properties say.

    Attributes:
        sequence: the choice that draws.
        row: the row of the step's logits to draw from; the choices of a prompt share one.
        draft: draft tokens from the sequence's next position on.
        index: how many of them are before this position, assumed to be right.
    """

    sequence: Sequence
    row: int
    draft: tuple[int, ...] = ()
    index: int = 0

    @property
    def draft_token(self) -> int | None:
        """The draft token at this position; None behind the last one."""
        return self.draft[self.index] if self.index < len(self.draft) else None

    @property
    def expected(self) -> int | None:
        """The token that the sequence takes here, whatever is drawn; None if it takes what is drawn."""
        follow = self.sequence.follow
        return None if follow is None else follow[self.generated]

    @property
    def records(self) -> bool:
        return self.sequence.records

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params

    @property
    def seed(self) -> int:
        return self.sequence.seed

    @property
    def choice_index(self) -> int:
        return self.sequence.choice_index

    @property
    def position(self) -> int:
        return self.sequence.position + self.index

    @property
    def generated(self) -> int:
        return self.sequence.generated + self.index

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.sequence.prompt_token_ids

    @property
    def output_counts(self) -> Counter[int]:
        counts = self.sequence.output_counts
        return counts + Counter(self.draft[: self.index]) if self.index else counts


@dataclass(slots=True)
class Schedule:
    """One step.

    Attributes:
        chunks: what to compute, in the order of the forward pass's rows.
        copies: (from block, to block), to be carried out in order before anything is written.
        draws: which tokens to draw; those of one sequence stand together, in order of position.
        scores: which prompt tokens to describe.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    scores: list[PromptScore] = field(default_factory=list)

    def plan_rows(self) -> None:
        """Fill in `draws` and `scores`, once all chunks are chosen.

        A fork that was preempted meanwhile draws in a later step.
        """
        end = 0
        for chunk in self.chunks:
            end += chunk.num_rows
            sequence, draft = chunk.sequence, chunk.draft
            if sequence.scores_prompt:
                place = chunk.start + chunk.count - end  # a row's token is at `row + place`, and it describes the next
                last = min(end, len(sequence.prompt_token_ids) - 1 - place)
                rows = range(end - chunk.num_rows, last)
                self.scores += [PromptScore(sequence, row, row + place + 1) for row in rows]
            if not chunk.samples:
                continue
            row = end - 1 - len(draft)
            self.draws += [Draw(sequence, row + index, draft, index) for index in range(len(draft) + 1)]
            for fork in chunk.forks:
                if fork.state is SequenceState.RUNNING:
                    self.draws.append(Draw(fork, row))

    def check(self) -> None:
        """Assert every invariant of draws and scores. Tests call it after each step of their random walks."""
        used = [draw.row for draw in self.draws] + [score.row for score in self.scores]
        assert set(used) <= set(range(sum(chunk.num_rows for chunk in self.chunks)))
        unused = sum(chunk.num_rows for chunk in self.chunks) - len(set(used))
        assert unused <= sum(chunk.sequence.params.max_tokens == 0 for chunk in self.chunks), "rows for nothing"
        for sequence, scores in groupby(self.scores, lambda score: score.sequence):
            positions = [score.position for score in scores]
            assert positions == list(range(sequence.next_scored, sequence.next_scored + len(positions)))
            assert positions[-1] < len(sequence.prompt_token_ids)
        places: dict[int, list[Draw]] = {}
        for before, draw in zip([None, *self.draws], self.draws, strict=False):
            mine = places.setdefault(id(draw.sequence), [])
            assert not mine or (before is not None and before.sequence is draw.sequence), "a sequence's draws are apart"
            assert draw.sequence.state is SequenceState.RUNNING
            assert draw.index == len(mine)
            assert not mine or draw.draft == mine[0].draft
            assert not mine or draw.row == mine[-1].row + 1
            mine.append(draw)
        assert all(draws[-1].draft_token is None for draws in places.values())

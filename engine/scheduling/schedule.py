"""One step, as plain data: which tokens to compute, which blocks to copy first, which tokens to draw. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.scheduling.sequence import Sequence, SequenceState
from engine.types.sampling_params import SamplingParams

__all__ = ["Chunk", "Draw", "Schedule"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens `start … start + count - 1` of a sequence.

    Attributes:
        samples: the last of them is the sequence's last token, so its logits choose the next one.
        forks: choices that share this prompt and draw their first token from the same logits.
        draft: draft tokens, the last of the tokens to compute. Each row from the last real token on chooses a token.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    forks: tuple[Sequence, ...] = ()
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute."""
        real = self.sequence.tokens(self.start, self.start + self.count - len(self.draft))
        return [*real, *self.draft]

    @property
    def num_rows(self) -> int:
        """Rows of logits that the forward pass returns for this chunk."""
        return 1 + len(self.draft) if self.samples else 0


@dataclass(slots=True, eq=False)  # not frozen: that would double the time to make one, which every token needs
class Draw:
    """One token to draw, as it would be drawn alone. What the sampler asks of a row is what its properties say.

    Attributes:
        sequence: the choice that draws.
        row: the row of the step's logits to draw from; the choices of a prompt share one.
        draft: the draft tokens before this position, assumed to be right.
        draft_token: the draft token at this position; None behind the last one.
    """

    sequence: Sequence
    row: int
    draft: tuple[int, ...] = ()
    draft_token: int | None = None

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
        return self.sequence.position + len(self.draft)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.sequence.prompt_token_ids

    @property
    def output_counts(self) -> Counter[int]:
        counts = self.sequence.output_counts
        return counts + Counter(self.draft) if self.draft else counts


@dataclass(slots=True)
class Schedule:
    """One step.

    Attributes:
        chunks: what to compute, in the order of the forward pass's rows.
        copies: (from block, to block), to be carried out in order before anything is written.
        draws: which tokens to draw; those of one sequence stand together, in order of position.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)

    def plan_draws(self) -> None:
        """Fill in `draws`, once all chunks are chosen. A fork that was preempted meanwhile draws in a later step."""
        row = 0
        for chunk in self.chunks:
            if not chunk.samples:
                continue
            sequence, draft = chunk.sequence, chunk.draft
            for count, token in enumerate(draft):
                self.draws.append(Draw(sequence, row + count, draft[:count], token))
            self.draws.append(Draw(sequence, row + len(draft), draft))
            for fork in chunk.forks:
                if fork.state is SequenceState.RUNNING:
                    self.draws.append(Draw(fork, row))
            row += chunk.num_rows

    def check(self) -> None:
        """Assert every invariant of the draws. Tests call it after each step of their random walks."""
        assert {draw.row for draw in self.draws} == set(range(sum(chunk.num_rows for chunk in self.chunks)))
        places: dict[int, list[Draw]] = {}
        for before, draw in zip([None, *self.draws], self.draws, strict=False):
            mine = places.setdefault(id(draw.sequence), [])
            assert not mine or (before is not None and before.sequence is draw.sequence), "a sequence's draws are apart"
            assert draw.sequence.state is SequenceState.RUNNING
            assert draw.draft == tuple(previous.draft_token for previous in mine)
            assert not mine or draw.row == mine[-1].row + 1
            mine.append(draw)
        assert all(draws[-1].draft_token is None for draws in places.values())

"""`Sequence`: the tokens of one choice, its blocks, and how far it is computed. Pure data; decides nothing.

A request with n choices has n sequences over the same prompt. A forward pass depends on `prompt + output` and
`num_computed` alone: preempting a sequence sets `num_computed` back to zero and changes nothing else.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

from engine.types.sampling_params import SamplingParams


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request.

    Attributes:
        prompt_token_ids: shared by all choices of the request, never changed.
        begun: how many of its last tokens are the beginning of the reply, which goes on from there.
        output_token_ids: what has been generated so far, the end token included.
        output_counts: how often each id occurs in the reply, its given beginning included; updated by `append`.
        block_table: ids of the blocks that hold its keys and values, in order. Owned by the block pool.
        block_uids: the pool's names for the contents of its full, computed blocks, in order.
        num_computed: tokens of `prompt + output` whose keys and values are in those blocks.
        num_cached: prompt tokens found in the prefix cache at admission.
        siblings: on choice 0 only: the choices that wait until its prompt is computed.
        group: whose request it is; the scheduler is fair between groups.
        share: the share of the prefix cache that it reads and fills.
        follow: the tokens of a reply that is checked: it takes them, whatever is drawn. None: it takes what is drawn.
        records: whether the scores of each draw are wanted.
        next_scored: the first prompt token whose log-probability is still wanted; the prompt's length if none is.
        adapter: the adapter that computes it; empty: none.
        start_tag: its place in the fair order, set by the scheduler.
    """

    request_id: str
    choice_index: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    state: SequenceState = SequenceState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    output_counts: Counter[int] = field(default_factory=Counter)
    block_table: list[int] = field(default_factory=list)
    block_uids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    siblings: list[Sequence] = field(default_factory=list)
    group: str = ""
    share: tuple[str, ...] = ()
    follow: tuple[int, ...] | None = None
    records: bool = False
    next_scored: int = -1
    adapter: str = ""
    start_tag: int = 0
    begun: int = 0
    _length: int = field(init=False)

    def __post_init__(self) -> None:
        self._length = len(self.prompt_token_ids) + len(self.output_token_ids)
        if self.next_scored < 0:
            self.next_scored = len(self.prompt_token_ids)
        if self.begun:
            self.output_counts.update(self.beginning)

    def __len__(self) -> int:
        return self._length

    @property
    def beginning(self) -> tuple[int, ...]:
        """The tokens with which the reply was begun by its caller; most often none."""
        return self.prompt_token_ids[len(self.prompt_token_ids) - self.begun :]

    @property
    def own_prompt(self) -> tuple[int, ...]:
        """The prompt without the beginning of the reply."""
        return self.prompt_token_ids[: len(self.prompt_token_ids) - self.begun]

    @property
    def position(self) -> int:
        """Index of the next token in the reply: what the draw depends on, beside seed and choice."""
        return self.begun + len(self.output_token_ids)

    @property
    def generated(self) -> int:
        """Tokens that were generated so far: the reply's, without its given beginning."""
        return len(self.output_token_ids)

    @property
    def expected(self) -> int | None:
        """The token that it takes next, whatever is drawn; None if it takes what is drawn."""
        return None if self.follow is None else self.follow[self.generated]

    @property
    def num_uncomputed(self) -> int:
        return self._length - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of prompt tokens are still wanted."""
        return self.next_scored < len(self.prompt_token_ids)

    def token(self, index: int) -> int:
        split = len(self.prompt_token_ids)
        return self.prompt_token_ids[index] if index < split else self.output_token_ids[index - split]

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions `start … end - 1` of prompt and output together."""
        split = len(self.prompt_token_ids)
        return [
            *self.prompt_token_ids[start:end],
            *self.output_token_ids[max(start - split, 0) : max(end - split, 0)],
        ]

    def append(self, token_id: int) -> None:
        self.output_token_ids.append(token_id)
        self._length += 1
        self.output_counts[token_id] += 1

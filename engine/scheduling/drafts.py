"""Proposes draft tokens by prompt look-up: if the last few tokens occurred before, it proposes what followed them then.

Draft tokens cost extra rows in a forward pass that reads all weights anyway, and change no reply: each position is
drawn from its own logits with its own randomness, and a draft token is kept only if that draw gives the same token. So
the law makes speculation exact at any temperature. Pure; knows no model and no text.

Source of the method: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from typing import Final

from engine.scheduling.sequence import Sequence

__all__ = ["Drafter"]

NGRAM: Final = 3
"""Tokens that are looked up."""
MOST: Final = 8
"""Tokens of one draft. More rows than this are no longer cheap."""
_LONGEST_PAUSE: Final = 64  # decoding steps


class Drafter:
    """Proposes draft tokens for one sequence, and learns how many are worth it.

    Drafts grow up to `MOST` tokens while they are right. After wrong ones the drafter pauses, each time for longer.

    Attributes:
        limit: tokens of the next draft at most.
    """

    __slots__ = ("_follows", "_indexed", "_misses", "_pause", "limit")

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # `NGRAM` tokens → the position after their last occurrence
        self._indexed = 0  # tokens that have been entered into `_follows`
        self._misses = 0
        self._pause = 0
        self.limit = 4

    def propose(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Propose up to `room` next tokens; none if the last tokens have not occurred before, or in a pause."""
        length = len(sequence)
        if self._pause:
            self._pause -= 1
            return ()
        tokens = sequence.tokens(max(self._indexed - NGRAM, 0), length)
        first = max(self._indexed - NGRAM, 0)
        for at in range(max(self._indexed, NGRAM), length):
            self._follows[tuple(tokens[at - NGRAM - first : at - first])] = at
        self._indexed = length
        place = self._follows.get(tuple(tokens[-NGRAM:])) if length >= NGRAM else None
        if place is None or room <= 0:
            return ()
        count, period = min(self.limit, room), length - place
        again = sequence.tokens(place, min(place + count, length))
        return tuple(again[i % period] for i in range(count))  # a repetition is taken to go on

    def learn(self, proposed: int, accepted: int) -> None:
        """Note how many tokens of a draft were accepted."""
        if accepted == proposed:
            self.limit = min(2 * self.limit, MOST)
        else:
            self.limit = max(accepted + 1, 2)
        self._misses = 0 if accepted else self._misses + 1
        self._pause = min(2**self._misses, _LONGEST_PAUSE) if self._misses > 1 else 0

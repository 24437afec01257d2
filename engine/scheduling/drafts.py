"""Prompt look-up: what came after the same few tokens before is guessed to come again. Pure; knows no model, no text.

A guess costs rows in a forward pass that reads all weights anyway, and changes nothing: the draw of a position depends
on its own logits and its own randomness, so a guessed token stands exactly where it would have been drawn
(https://github.com/apoorvumang/prompt-lookup-decoding; the law makes it exact at any temperature).
"""

from __future__ import annotations

from typing import Final

from engine.scheduling.sequence import Sequence

__all__ = ["Drafter"]

NGRAM: Final = 3
"""Tokens that must have come before in the same order."""
MOST: Final = 8
"""Tokens of one guess. More rows than this no longer cost little."""
_LONGEST_PAUSE: Final = 64


class Drafter:
    """Guesses for one sequence, as many tokens as have been worth it, and rests after guesses that were not.

    Where text repeats itself a guess grows to `MOST`; where it does not, guessing stops for longer and longer.
    """

    __slots__ = ("_follows", "_indexed", "_misses", "_pause", "limit")

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # `NGRAM` tokens → where the last ones like it went on
        self._indexed = 0  # tokens whose continuation is known
        self._misses = 0
        self._pause = 0
        self.limit = 4

    def propose(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """The next tokens, perhaps; at most `room`."""
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
        return tuple(again[i % period] for i in range(count))  # what repeats itself goes on repeating

    def learn(self, proposed: int, accepted: int) -> None:
        """How many of a guess's tokens came."""
        if accepted == proposed:
            self.limit = min(2 * self.limit, MOST)
        else:
            self.limit = max(accepted + 1, 2)
        self._misses = 0 if accepted else self._misses + 1
        self._pause = min(2**self._misses, _LONGEST_PAUSE) if self._misses > 1 else 0

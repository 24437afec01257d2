"""Proposes draft tokens: what followed the same few tokens earlier in the text, or in a text that the caller predicts.

Draft tokens cost extra rows in a forward pass that reads all weights anyway, and change no reply: each position is
drawn from its own logits with its own randomness, and a draft token is kept only if that draw gives the same token. So
the law makes speculation exact at any temperature. Pure; knows no model and no text.

Source of the method: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence as Tokens
from typing import Final

from engine.scheduling.sequence import Sequence

__all__ = ["Drafter", "Prediction", "places_of"]

NGRAM: Final = 3
"""Tokens that are looked up."""
MOST: Final = 8
"""Tokens of one draft of what came earlier. More rows than this are no longer cheap."""
MOST_PREDICTED: Final = 512
"""Tokens of one draft of a prediction, which is right far more often."""
_LONGEST_PAUSE: Final = 64  # decoding steps


class _Pace:
    """Learns how long drafts may be.

    They grow up to `most` tokens while they are right. After wrong ones there is a pause, each time for longer.

    Attributes:
        limit: tokens of the next draft at most.
    """

    __slots__ = ("_misses", "_most", "_pause", "limit")

    def __init__(self, first: int, most: int) -> None:
        self._misses = 0
        self._most = most
        self._pause = 0
        self.limit = first

    def learn(self, proposed: int, accepted: int) -> None:
        """Note how many tokens of a draft were accepted."""
        if accepted == proposed:
            self.limit = min(2 * self.limit, self._most)
        else:
            self.limit = max(accepted + 1, 2)
        self._misses = 0 if accepted else self._misses + 1
        self._pause = min(2**self._misses, _LONGEST_PAUSE) if self._misses > 1 else 0

    def _pauses(self) -> bool:
        if self._pause:
            self._pause -= 1
            return True
        return False


class Drafter(_Pace):
    """Proposes, for one sequence, what followed its last few tokens when they occurred before."""

    __slots__ = ("_follows", "_indexed")

    def __init__(self) -> None:
        super().__init__(4, MOST)
        self._follows: dict[tuple[int, ...], int] = {}  # `NGRAM` tokens → the position after their last occurrence
        self._indexed = 0  # tokens that have been entered into `_follows`

    def propose(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Propose up to `room` next tokens; none if the last tokens have not occurred before, or in a pause."""
        length = len(sequence)
        if self._pauses():
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


Places = Mapping[tuple[int, ...], Tokens[int]]
"""`NGRAM` tokens → the places after them, upward."""


def places_of(tokens: tuple[int, ...]) -> Places:
    """Return where each `NGRAM` tokens of a text lead."""
    places: dict[tuple[int, ...], list[int]] = {}
    for at in range(NGRAM, len(tokens)):
        places.setdefault(tokens[at - NGRAM : at], []).append(at)
    return places


class Prediction(_Pace):
    """Follows a reply along the tokens that its caller predicted, and proposes those that come next.

    A token that differs is taken to stand in place of the predicted one. Where that is wrong, because something was
    inserted or left out, the next few tokens that occur further on in the prediction set it right.

    Attributes:
        accepted: tokens of the reply that were the next ones of the prediction. It depends on the two texts alone, not
            on which drafts were really tried.
    """

    __slots__ = ("_last", "_next", "_places", "_tokens", "accepted")

    def __init__(self, tokens: Tokens[int], places: Places | None = None) -> None:
        """Begin before the first token. `places`: `places_of(tokens)`, which the choices of a request share."""
        super().__init__(16, MOST_PREDICTED)
        self._tokens = tuple(tokens)
        self._next = 0  # the place of the token that is expected
        self._last: tuple[int, ...] = ()  # the reply's last tokens, at most `NGRAM`
        self._places = places_of(self._tokens) if places is None else places
        self.accepted = 0

    def push(self, token: int) -> None:
        """Take the reply's next token."""
        self._last = (*self._last, token)[-NGRAM:]
        if self._next < len(self._tokens) and self._tokens[self._next] == token:
            self.accepted += 1
        else:
            places = self._places.get(self._last, [])
            found = bisect_left(places, self._next + 1)
            if found < len(places):
                self._next = places[found]
                return
        self._next += 1

    def propose(self, room: int) -> tuple[int, ...]:
        """Propose up to `room` next tokens; none behind the end of the prediction, or in a pause."""
        if self._next >= len(self._tokens) or self._pauses():
            return ()
        return self._tokens[self._next : self._next + min(self.limit, room)]

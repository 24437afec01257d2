"""Token ids of one choice → what its caller sees: answer, thoughts and tool calls, up to the first stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.replies.reply_parser import ReplyParser
from engine.text.stop_strings import StopMatcher, StopStrings
from engine.text.vocabulary import Detokenizer, Vocabulary

__all__ = ["TextDelta", "TextStream"]


class TextDelta(NamedTuple):
    """What one token did: text that may be shown now, whether it completed a stop string, the bytes it adds.

    `reasoning`: what it adds to the thoughts, which are not part of the text. `calls`: tool calls that it completes, as
    (name, arguments), which are not, either.
    """

    text: str
    stopped: bool
    bytes: bytes
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


class TextStream:
    """Ids of one choice in, its text out. Joined deltas are the whole answer.

    A token that is pushed with `match_stops=False` (below `min_tokens`, inside hidden reasoning) shows its text at
    once, with all that was held back: a stop string is found only in characters completed by tokens that match, and
    one that would begin before them is not found.

    With a `parser`, thoughts and tool calls come out apart; stop strings are looked for in the rest alone.
    """

    __slots__ = ("_delimiters", "_detokenizer", "_match_stops", "_matcher", "_parser", "stopped")

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: StopStrings | Sequence[str] = (),
        parser: ReplyParser | None = None,
        delimiters: Mapping[int, str] | None = None,
    ) -> None:
        """`delimiters`: special tokens by id that the parser must see although they add no text."""
        self._detokenizer = Detokenizer(vocabulary)
        self._parser = parser
        self._delimiters = delimiters or {}
        self._matcher = StopMatcher(stop if isinstance(stop, StopStrings) else StopStrings(stop))
        self._match_stops = True
        self.stopped = False
        """True once a stop string is complete: the text has ended."""

    def token_bytes(self, token_id: int) -> bytes:
        """The true bytes of a candidate at this place; ask before the chosen one is pushed."""
        return self._detokenizer.token_bytes(token_id)

    def push(self, token_id: int, match_stops: bool = True) -> TextDelta:
        """Take one id. Must not be called after a stop string was found."""
        assert not self.stopped, "the text has ended"
        self._match_stops = match_stops
        text, data = self._detokenizer.push(token_id)
        if self._parser is None:
            return TextDelta(*self._match(text), data)
        if token_id in self._delimiters:
            text += self._detokenizer.flush() + self._delimiters[token_id]
        reasoning, text, calls = self._parser.push(text)
        return TextDelta(*self._match(text), data, reasoning, calls)

    @property
    def whole(self) -> bool:
        """Whether the text so far ends with a whole character."""
        return self._detokenizer.whole

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends among the thoughts."""
        return self._parser is not None and self._parser.thinking

    def finish(self) -> TextDelta:
        """End for another reason than a stop string: what is held back or half a character comes out now.

        The U+FFFD of a cut character can still complete a stop string; then `stopped` says so. Empty after a stop.
        """
        if self.stopped:
            return TextDelta("", True, b"")
        text, reasoning = self._detokenizer.flush(), ""
        calls: tuple[tuple[str, str], ...] = ()
        if self._parser is not None:
            last, rest = self._parser.push(text), self._parser.finish()
            reasoning, text, calls = last.reasoning + rest.reasoning, last.text + rest.text, last.calls + rest.calls
        text, stopped = self._match(text)
        return TextDelta(text if stopped else text + self._matcher.release(), stopped, b"", reasoning, calls)

    def _match(self, text: str) -> tuple[str, bool]:
        if not self._match_stops:
            return self._matcher.release() + text, False
        text, self.stopped = self._matcher.push(text)
        return text, self.stopped

"""`TextStream`: turns the token ids of one choice into answer, thoughts and tool calls, up to the first stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.replies.reply_parser import ReplyParser
from engine.text.stop_strings import StopMatcher, StopStrings
from engine.text.vocabulary import Detokenizer, Vocabulary

__all__ = ["TextDelta", "TextStream"]


class TextDelta(NamedTuple):
    """What one token adds to a choice."""

    text: str
    """Text of the answer that can be shown now."""
    stopped: bool
    """Whether the token completed a stop string."""
    bytes: bytes
    """The bytes of the token itself."""
    reasoning: str = ""
    """Text of the thoughts, which is no part of `text`."""
    calls: tuple[tuple[str, str], ...] = ()
    """Tool calls that it completes, as (name, arguments), which are no part of `text`."""


class TextStream:
    """Takes the token ids of one choice and returns its text. The joined deltas are the whole answer.

    A token pushed with `match_stops=False` (below `min_tokens`) shows its text at once, with all text held back before
    it. A stop string is found only in characters completed by tokens that match, and must begin in them.

    With a `parser`, thoughts and tool calls are returned separately, and stop strings are searched in the answer only.
    """

    __slots__ = ("_delimiters", "_detokenizer", "_match_stops", "_matcher", "_parser", "stopped")

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: StopStrings | Sequence[str] = (),
        parser: ReplyParser | None = None,
        delimiters: Mapping[int, str] | None = None,
        previous: int | None = None,
        *,
        alike: bool = False,
    ) -> None:
        """Begin the text of a choice.

        Args:
            delimiters: special tokens by id that the parser must see although they add no text.
            previous, alike: see `Detokenizer`.
        """
        self._detokenizer = Detokenizer(vocabulary, previous, alike=alike)
        self._parser = parser
        self._delimiters = delimiters or {}
        self._matcher = StopMatcher(stop if isinstance(stop, StopStrings) else StopStrings(stop))
        self._match_stops = True
        self.stopped = False
        """Whether a stop string is complete, so that the text has ended."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a candidate would add. To be called before the chosen token is pushed."""
        return self._detokenizer.token_bytes(token_id)

    def push(self, token_id: int, match_stops: bool = True) -> TextDelta:
        """Take one token id. Must not be called after a stop string was found."""
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
        """Whether the text so far ends with a complete character."""
        return self._detokenizer.whole

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the text; None if none has."""
        return self._matcher.found

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the thoughts."""
        return self._parser is not None and self._parser.thinking

    def finish(self, *, cut: bool = False) -> TextDelta:
        """End the text; return what was held back, and an incomplete character as U+FFFD. Empty after a stop string.

        `cut`: as in `ReplyParser.finish`. That U+FFFD can still complete a stop string; then `stopped` is set.
        """
        if self.stopped:
            return TextDelta("", True, b"")
        text, reasoning = self._detokenizer.flush(), ""
        calls: tuple[tuple[str, str], ...] = ()
        if self._parser is not None:
            last, rest = self._parser.push(text), self._parser.finish(cut=cut)
            reasoning, text, calls = last.reasoning + rest.reasoning, last.text + rest.text, last.calls + rest.calls
        text, stopped = self._match(text)
        return TextDelta(text if stopped else text + self._matcher.release(), stopped, b"", reasoning, calls)

    def _match(self, text: str) -> tuple[str, bool]:
        if not self._match_stops:
            return self._matcher.release() + text, False
        text, self.stopped = self._matcher.push(text)
        return text, self.stopped

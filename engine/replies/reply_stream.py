"""`TextStream`: turns the token ids of one choice into answer, thoughts and tool calls, up to the first stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.replies.delimiters import shared
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


class _Seen(NamedTuple):
    """What was held back at the end of a beginning that the caller gave, and so has seen."""

    thoughts: str
    text: str
    thinking: bool
    """Whether the beginning ended inside the thoughts."""


class TextStream:
    """Takes the token ids of one choice and returns its text. The joined deltas are the whole answer.

    A token pushed with `match_stops=False` (below `min_tokens`) shows its text at once, with all text held back before
    it. A stop string is found only in characters completed by tokens that match, and must begin in them.

    With a `parser`, thoughts and tool calls are returned separately, and stop strings are searched in the answer only.
    """

    __slots__ = ("_begun", "_delimiters", "_detokenizer", "_match_stops", "_matcher", "_parser", "_seen", "stopped")

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
        self._begun = False  # whether the text so far was given
        self._seen: _Seen | None = None
        self.stopped = False
        """Whether a stop string is complete, so that the text has ended."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a candidate would add. To be called before the chosen token is pushed."""
        return self._detokenizer.token_bytes(token_id)

    def push(self, token_id: int, match_stops: bool = True) -> TextDelta:
        """Take one token id. Must not be called after a stop string was found."""
        assert not self.stopped, "the text has ended"
        delta = self._push(token_id, match_stops)
        return delta if self._seen is None else self._unseen(delta)

    def begin(self, token_id: int, match_stops: bool = True) -> TextDelta:
        """Take one token id of the reply's beginning, which the caller gave. A stop string in it ends nothing.

        One may begin in it, and end behind it. `end_beginning` follows the last one.
        """
        self._begun = True
        delta = self._push(token_id, match_stops)
        self._begun = False
        return delta

    def end_beginning(self) -> str:
        """End the beginning that was given. Returns the text of the answer that is held back.

        It is the caller's already, so it is not shown again when it is certain.
        """
        thoughts, text = "", self._matcher.held
        if self._parser is not None:
            thoughts, more, _ = self._parser.held
            text += more
        if thoughts or text:
            self._seen = _Seen(thoughts, text, self.thinking)
        return text

    def _unseen(self, delta: TextDelta) -> TextDelta:
        """Leave out of a delta what its caller has seen."""
        seen = self._seen
        if seen is None:
            return delta
        thoughts, text = (
            new[shared(new, old) :] for new, old in ((delta.reasoning, seen.thoughts), (delta.text, seen.text))
        )
        ended = (
            thoughts or text or delta.calls or self.thinking != seen.thinking
        )  # what was held was a delimiter, or more
        rest = _Seen(seen.thoughts[len(delta.reasoning) :], seen.text[len(delta.text) :], seen.thinking)
        self._seen = None if ended else rest
        return delta._replace(reasoning=thoughts, text=text)

    def _push(self, token_id: int, match_stops: bool) -> TextDelta:
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
        delta = TextDelta(text if stopped else text + self._matcher.release(), stopped, b"", reasoning, calls)
        return self._unseen(delta)

    def _match(self, text: str) -> tuple[str, bool]:
        if not self._match_stops:
            return self._matcher.release() + text, False
        if self._begun:
            return self._matcher.pass_on(text), False
        text, self.stopped = self._matcher.push(text)
        return text, self.stopped

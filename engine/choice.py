"""One running choice: tokens in, deltas out, and what may come next. Knows no scheduler, no logits, no other choice.

begin     take the tokens with which the caller has begun the reply
append    take one token: the text it shows, and whether the choice ends with it
draft     what may be expected to come next, if anything
advance   take a drawn token and those that are forced after it: one delta
finish    release the text that was held back, once nothing more will come
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from engine.errors import InvalidParameter
from engine.grammar.compiler import GrammarState
from engine.replies.reply_stream import TextDelta, TextStream
from engine.replies.tool_calls.reader import call_id
from engine.sampling.sampler import Sampled
from engine.scheduling.drafts import Drafter, Prediction
from engine.scheduling.sequence import Sequence
from engine.text.schema_check import unenforced_errors
from engine.text.vocabulary import Vocabulary
from engine.types.messages import ToolCall
from engine.types.outputs import ChoiceDelta, FinishReason, TokenCheck, TokenLogprob, TopLogprob
from engine.types.reply_format import ReplyFormat

__all__ = ["Choice", "SpecialIds"]

_MOST_ONE_BY_ONE: Final = 64
"""Draft tokens of one step where each is drawn by itself: so many calls of the sampler, and masks, at most."""
_MOST_FOLLOWED: Final = 512
"""Tokens of a reply that are checked in one step."""
_FEW_FOLLOWED: Final = 16
_FEW_DIFFERENT: Final = 4


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Tokens of one model with a meaning of their own.

    Attributes:
        end: any of them ends a reply.
        close_thoughts: these, one after the other, end thoughts that have grown too long.
    """

    end: frozenset[int]
    close_thoughts: tuple[int, ...]


class Choice:
    """One choice of a request, from its first token to its last.

    Attributes:
        sequence: its tokens and cache blocks.
        text: turns its tokens into what the caller sees.
        grammar: the state of the grammar that its reply is held to; None if there is none.
        drafter: proposes what came earlier in the text; None where that is off.
        prediction: follows the text that the caller predicted; None if there is none.
        num_thoughts: tokens of thought so far, those of a given beginning included.
    """

    __slots__ = (
        "_different",
        "_follow_limit",
        "_forced",
        "_format",
        "_given_calls",
        "_given_thoughts",
        "_ids",
        "_learner",
        "_num_calls",
        "_right",
        "_schema_error",
        "_vocabulary",
        "_written",
        "drafter",
        "grammar",
        "num_thoughts",
        "prediction",
        "sequence",
        "text",
    )

    def __init__(
        self,
        sequence: Sequence,
        reply_format: ReplyFormat,
        text: TextStream,
        grammar: GrammarState | None,
        vocabulary: Vocabulary,
        ids: SpecialIds,
    ) -> None:
        self.sequence = sequence
        self.grammar = grammar
        self.drafter: Drafter | None = None
        self.prediction: Prediction | None = None
        self._learner: Drafter | Prediction | None = None  # whose draft was taken last
        self._right = 0  # tokens of that draft that were right
        self._different = 0  # since that draft, draws of another token than the one that is followed
        self.num_thoughts = 0
        self._format = reply_format
        self.text = text
        self._vocabulary = vocabulary
        self._ids = ids
        self._forced: deque[int] = deque()  # tokens that come next whatever the model says: the end of long thoughts
        self._num_calls = 0
        self._given_calls = self._given_thoughts = 0  # those in the beginning that the caller gave
        self._follow_limit = _MOST_FOLLOWED
        self._written: list[str] = []  # the text so far, where it is to be checked against a schema in the end
        self._schema_error: str | None = None  # of calls that no grammar held to all of their schema; "": none
        self._limit_thoughts()

    @property
    def generated_thoughts(self) -> int:
        """Tokens of thought that were generated."""
        return self.num_thoughts - self._given_thoughts

    @property
    def forced(self) -> int | None:
        """The only token that may come next; None if there are several."""
        return self._forced[0] if self._forced else self.grammar.forced if self.grammar else None

    @property
    def is_free(self) -> bool:
        """Whether the model alone decides what comes next."""
        return self.grammar is None and not self._forced

    @property
    def stays_free(self) -> bool:
        """Whether the model alone decides what comes, however long the reply grows.

        Then the draws of a whole draft do not depend on what becomes of the text, and are made together.
        """
        return self.grammar is None and self.sequence.params.thinking_budget is None

    @property
    def may_draft(self) -> bool:
        """Whether the next step may compute a draft, or a token that is forced."""
        return self.drafter is not None or self.prediction is not None or self.forced is not None

    def draft(self, room: int) -> tuple[int, ...]:
        """Propose up to `room` next tokens."""
        sequence, grammar = self.sequence, self.grammar
        self._learner, self._right, self._different = None, 0, 0
        if grammar is not None and grammar.slow:
            return ()  # its next mask is computed beside the steps, and so is the one after it
        if not self.stays_free:
            room = min(room, _MOST_ONE_BY_ONE)
        if sequence.follow is not None:
            # Nothing is drawn behind the last token, so it is not computed.
            end = min(sequence.generated + min(room, self._follow_limit), len(sequence.follow) - 1)
            return sequence.follow[sequence.generated : end]
        if forced := tuple(self._forced) or (grammar.all_forced if grammar else ()):
            return forced[:room]  # where they are drawn at all
        for source in (self.prediction, self.drafter):
            found: tuple[int, ...] = ()
            if isinstance(source, Prediction):
                found = source.propose(room)
            elif source is not None and sequence.generated:
                found = source.propose(sequence, room)
            if found:
                self._learner = source
                return found
        return ()

    def accept(self, right: int) -> None:
        """Note that so many more tokens of the last draft were right."""
        self._right += right

    def learn(self, proposed: int) -> None:
        """Learn from the last draft, of so many tokens, once its step has ended.

        How close another token was takes a look at the whole vocabulary. So where a reply that is checked differs
        often, less of it is checked in one step.
        """
        self._follow_limit = _FEW_FOLLOWED if self._different > _FEW_DIFFERENT else _MOST_FOLLOWED
        if self._learner is not None:
            self._learner.learn(proposed, self._right)

    def advance(self, drawn: Sampled) -> ChoiceDelta:
        """Append a drawn token, and the tokens that are forced after it. A reply that is checked takes its own token.

        Raises: whatever the grammar raises, if it cannot go on.
        """
        params, sequence, check = self.sequence.params, self.sequence, drawn.check
        if self.grammar:
            self.grammar.check()
        if check is not None and check.closeness == math.inf and self.grammar is not None:
            return self._cut_off(check)  # the grammar cannot take it
        logprobs = (self._logprob(drawn),) if params.logprobs and check is None else None
        first = drawn.token_id if check is None else check.expected
        self._different += first != drawn.token_id
        tokens, checks = [first], [] if check is None else [check]
        delta, finish = self._append(first)
        # Log-probabilities need a forward pass: with them a forced token is drawn, with no other to choose from.
        while finish is None and not params.logprobs and (forced := self.forced) is not None:
            if sequence.follow is not None and (expected := self._followed()) != forced:
                if expected is not None:
                    checks.append(TokenCheck(expected, forced, -math.inf, -math.inf, math.inf))
                break
            tokens.append(forced)
            more, finish = self._append(forced)
            delta = _joined(delta, more)
        goes_on = finish is None and (len(checks) > 1 or (sequence.follow is not None and self._followed() is None))
        if goes_on:
            finish = "length"
        if finish:
            rest = self.text.finish(cut=finish == "length")
            delta = _joined(delta, rest)
            finish = "stop" if rest.stopped else finish  # half a character, cut, may still complete a stop string
        calls = tuple(self._call(name, arguments) for name, arguments in delta.calls)
        if finish == "stop" and self._num_calls > self._given_calls:
            finish = "tool_calls"
        self._check_schema(delta.text, finish)
        return ChoiceDelta(
            index=self.sequence.choice_index,
            text=delta.text,
            token_ids=tuple(tokens),
            logprobs=logprobs,
            finish_reason=finish,
            reasoning=delta.reasoning,
            tool_calls=calls,
            scores=(drawn.score,) if drawn.score is not None and sequence.records else (),
            margins=(drawn.margin, *[None] * (len(tokens) - 1)) if params.margins else None,
            checks=tuple(checks),
            goes_on=goes_on,
            schema_error=self._schema_error if finish else None,
            stop_string=self.text.stop_string if finish else None,
        )

    def _followed(self) -> int | None:
        """Return the next token of a reply that is checked; None behind its end, and for any other reply."""
        follow, generated = self.sequence.follow, self.sequence.generated
        return follow[generated] if follow and generated < len(follow) else None

    def _cut_off(self, check: TokenCheck) -> ChoiceDelta:
        """End a reply that is checked before a token that could not be taken."""
        text = self.text.finish(cut=True)
        return ChoiceDelta(
            index=self.sequence.choice_index,
            text=text.text,
            token_ids=(),
            finish_reason="length",
            reasoning=text.reasoning,
            checks=(check,),
            goes_on=True,
        )

    def _append(self, token: int) -> tuple[TextDelta, FinishReason | None]:
        """Append one token. Returns the text it shows, and the finish reason if the choice ends with it."""
        sequence, params, text = self.sequence, self.sequence.params, self.text
        sequence.append(token)
        if self._forced:
            self._forced.popleft()
        if self.prediction is not None:
            self.prediction.push(token)
        if self._is_end(token):
            self.num_thoughts += text.thinking
            return TextDelta("", False, b""), "stop"  # the token adds no text
        before = text.thinking
        delta = text.push(token, sequence.generated > params.min_tokens)
        stopped = delta.stopped or bool(delta.calls and not self._format.parallel_tool_calls)
        self.num_thoughts += before or text.thinking  # the tokens that open and close them, too
        if self.grammar is not None and not stopped:
            self.grammar.consume(token)
            stopped = self.grammar.stopped  # nothing but the end could follow, so nothing is drawn for it
        self._limit_thoughts()
        return delta, "stop" if stopped else "length" if sequence.generated == params.max_tokens else None

    def _is_end(self, token: int) -> bool:
        """Whether a token, as the next one, ends the reply."""
        params = self.sequence.params
        ends = token in self._ids.end and not params.ignore_eos
        return token in params.stop_token_ids or (ends and (self.grammar is None or self.grammar.accepting))

    def begin(self, param: str) -> None:
        """Take the tokens with which the caller has begun the reply, as if they had been generated.

        Args:
            param: the request's field that gave them, for error messages.

        Raises:
            InvalidParameter: the reply ends in them, or its grammar does not allow them.
        """
        text, grammar = self.text, self.grammar
        for i, token in enumerate(self.sequence.beginning):
            if self._is_end(token):
                raise InvalidParameter(f"{param}: the reply ends with token {i} of it, {token}.", param=param)
            if self._forced and self._forced.popleft() != token:
                self._forced.clear()
            before = text.thinking
            delta = text.begin(token, not self.sequence.params.min_tokens)
            self.num_thoughts += before or text.thinking
            self._num_calls += len(delta.calls)
            self._written.append(delta.text)
            if delta.calls and not self._format.parallel_tool_calls:
                raise InvalidParameter(f"{param}: the reply ends with the call that it holds.", param=param)
            if grammar is not None:
                _consume(grammar, token, i, param)
            self._limit_thoughts()
        self._written.append(text.end_beginning())
        self._given_thoughts, self._given_calls = self.num_thoughts, self._num_calls

    def _limit_thoughts(self) -> None:
        """Force the end of thoughts that have used up their budget; a grammar takes it after whole characters only."""
        budget = self.sequence.params.thinking_budget
        if budget is None or not self.text.thinking or self.num_thoughts < budget or self._forced:
            return
        if self.grammar is None or self.text.whole:
            self._forced.extend(self._ids.close_thoughts)

    def _call(self, name: str, arguments: str) -> ToolCall:
        self._num_calls += 1
        found, sequence = self._format, self.sequence
        if name in found.unenforced_tools and not self._schema_error and (tool := found.tool(name)):
            error = unenforced_errors(arguments, tool.parameters)
            self._schema_error = f"{name}: {error}" if error else ""
        own_id = call_id(sequence.seed, sequence.choice_index, sequence.own_prompt, self._num_calls)
        return ToolCall(own_id, name, arguments)

    def _check_schema(self, text: str, finish: FinishReason | None) -> None:
        """Check the whole text, at its end, against a schema that the grammar holds only in part."""
        schema = self._format.unenforced_schema
        if schema is None:
            return
        self._written.append(text)
        if finish and not self._num_calls:
            self._schema_error = unenforced_errors("".join(self._written), schema) or ""

    def _logprob(self, drawn: Sampled) -> TokenLogprob:
        """Describe a drawn token and its alternatives, with the bytes that each would add at this place of the text."""
        assert drawn.logprob is not None
        words, text = self._vocabulary, self.text
        top = []
        for token, value in drawn.top:
            data = text.token_bytes(token)
            top.append(TopLogprob(token, words.token_text(token, data), data, value))
        data = text.token_bytes(drawn.token_id)
        return TokenLogprob(drawn.token_id, words.token_text(drawn.token_id, data), data, drawn.logprob, tuple(top))


def _joined(a: TextDelta, b: TextDelta) -> TextDelta:
    return TextDelta(a.text + b.text, b.stopped, a.bytes + b.bytes, a.reasoning + b.reasoning, a.calls + b.calls)


def _consume(grammar: GrammarState, token: int, place: int, param: str) -> None:
    """Advance a grammar by a token of a beginning that the caller gave."""
    try:
        grammar.consume(token)
    except InvalidParameter as error:
        raise InvalidParameter(
            f"{param}: token {place} of the reply's beginning, {token}, does not fit {error.param}.", param=param
        ) from None
    if grammar.stopped:
        raise InvalidParameter(
            f"{param}: the reply's beginning is a whole reply already: {grammar.param} allows nothing after it.",
            param=param,
        )

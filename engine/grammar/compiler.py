"""`GrammarCompiler`: compiles grammars with llguidance and computes the masks over the vocabulary that they allow.

    Constraint ──answer_grammar──▶ Lark text ──GrammarCompiler.start──▶ GrammarState, one per choice
                                                        masks for a batch, forced tokens

A grammar is a text in llguidance's dialect of Lark. As plain data it crosses from the preparer to the engine, and it is
the key under which its compiled form is kept. Knows token ids and bytes; no torch, no HTTP.
"""

from __future__ import annotations

import functools
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from engine.errors import InvalidParameter, Unsupported, one_line
from engine.grammar.lark import LarkWriter
from engine.grammar.token_table import TokenTable
from engine.text.spelling import Speller
from engine.text.vocabulary import Vocabulary

__all__ = ["GrammarCompiler", "GrammarState"]

_LARGE: Final = 32 * 1024
"""Characters of a grammar from which it is large: compiled, it takes some 220 bytes a character."""
_SMALL_KEPT: Final = 128  # compiled grammars, of 4 to 10 MiB
_LARGE_KEPT: Final = 8

STEP_FUEL: Final = 200_000
"""Expressions that one token may make the lexer construct, or thereabouts."""
_LIMITS: Final = LLParserLimits(
    step_lexer_fuel=STEP_FUEL, max_lexer_states=100_000, step_max_items=100_000, verbose_errors=False
)
"""Counts, not clocks: a reply that goes beyond one ends there, on every machine. Two Unicode classes in one expression
(`https?://[\\w.-]+(/[\\w./-]*)?`) or six words in any order take up to 100,000 of a step's fuel, which is 10 ms. A
class counted to 500 takes 50,000 states in 300 tokens, and 100,000 states are 100 MiB for one reply: llguidance's own
250,000 would be a quarter of a gigabyte. Its 50,000 items a step end an object of 200 optional properties in mid-reply;
480, which is as many as fit a row, take fewer than 100,000."""


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A compiled grammar, as it is kept."""

    matcher: LLMatcher
    first: array[int]
    """The tokens that it forces at the beginning. Spelled once, where the grammar is compiled: on the thread that
    prepares the request, not once for each choice on the engine's."""


class GrammarState:
    """The state of one choice in its grammar. Not safe to use from two threads at once.

    Attributes:
        param: the request's field that asks for the grammar.

    `slow` and `ahead` belong to `engine.grammar.mask_worker`: whether its masks take long, and its next mask, which is
    being computed.
    """

    __slots__ = ("_matcher", "_pending", "_speller", "ahead", "param", "slow")

    def __init__(self, matcher: LLMatcher, speller: Speller, param: str, first: Sequence[int] = ()) -> None:
        """Begin a reply.

        Args:
            param: the request's field that asks for the grammar, for error messages.
            first: the tokens that the grammar forces at the beginning, where they are known.

        Raises:
            Unsupported: no tokens spell the text that the grammar begins with.
        """
        self._matcher = matcher
        self._speller = speller
        self.param = param
        self.slow = False
        self.ahead: Any = None
        self._pending: deque[int] = deque(first)
        if not first:
            self._look_ahead()

    @property
    def forced(self) -> int | None:
        """The only token that may come next; None if several may.

        It spells the forced text as the tokenizer does, or to the byte where the tokenizer cannot. Appending it and
        drawing it give the same reply.
        """
        return self._pending[0] if self._pending else None

    @property
    def all_forced(self) -> tuple[int, ...]:
        """The tokens of which each is the only one that may come next, one after the other."""
        return tuple(self._pending)

    @property
    def stopped(self) -> bool:
        """Whether only the end may come next."""
        return self._matcher.is_stopped()

    @property
    def accepting(self) -> bool:
        """Whether the reply may end here."""
        return self._matcher.is_accepting()

    def consume(self, token_id: int) -> None:
        """Advance by the token that was chosen.

        Raises:
            InvalidParameter: the grammar does not allow it, or has grown beyond its limits.
            Unsupported: no tokens spell what must come next.
        """
        if self._pending and self._pending[0] == token_id:
            self._pending.popleft()
        else:
            self._pending.clear()
        if not self._matcher.consume_token(token_id):
            self._fail()
        if not self._pending and not self._matcher.is_stopped():
            self._look_ahead()

    def _look_ahead(self) -> None:
        self._pending.extend(self._matcher.compute_ff_tokens())
        # No tokens although text is forced: its last token is open, or it has no spelling.
        if self._pending or self._speller.complete:
            return
        if not self._speller.can_spell(text := self._matcher.compute_ff_bytes()):
            written = text[:60].decode("utf-8", "replace")
            raise Unsupported(
                f"{self.param}: no tokens of this model spell {written!r}, which the reply must contain.",
                param=self.param,
            )

    def _fail(self) -> None:
        raise InvalidParameter(
            f"The grammar cannot be followed any further: {one_line(self._matcher.get_error())}",
            param=self.param,
            code="grammar_failed",
        )

    def check(self) -> None:
        """Raise what `consume` raises if a limit was reached while a mask was computed."""
        if self._matcher.is_error():
            self._fail()


class GrammarCompiler:
    """Compiles grammars for one tokenizer and caches them by content. Safe to use from several threads.

    Args:
        vocabulary: the true bytes of each token.
        vocab_size: columns of the model's logits.
        end_ids: tokens that end a reply; allowed where the grammar is satisfied.
        encode: text → ids without special tokens, to spell forced text as the tokenizer does.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab_size: int,
        end_ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        names = {vocabulary.token_text(i): i for i in vocabulary.special_ids if vocabulary.token_text(i)}
        self._set_up(names, end_ids)
        self.vocab_size = vocab_size
        self.table: Callable[[], TokenTable] = lambda: TokenTable.of(vocabulary, vocab_size, names, end_ids)
        self._encode: Callable[[str], list[int]] | None = encode

    @classmethod
    def from_table(cls, table: TokenTable) -> GrammarCompiler:
        """Make a compiler without a tokenizer: it spells forced text greedily, and is otherwise the same."""
        made = cls.__new__(cls)
        made._set_up(table.names, table.ends)
        made.vocab_size = len(table.tokens)
        made.table = lambda: table
        made._encode = None
        return made

    def fresh(self) -> GrammarCompiler:
        """Return the same compiler with an empty cache."""
        made = GrammarCompiler.from_table(self.table())
        made._tokens, made._speller = self._tokens, self._speller
        return made

    def _set_up(self, names: Mapping[str, int], ends: Sequence[int]) -> None:
        self._ends = list(ends)
        self.lark = LarkWriter(names)
        """Writes rules in which this vocabulary's special tokens stand by their ids."""
        self._small = functools.lru_cache(_SMALL_KEPT)(self._compile_and_spell)
        self._large = functools.lru_cache(_LARGE_KEPT)(self._compile_and_spell)

    def warm(self) -> None:
        """Build the tokenizer now, not with the first grammar: a large vocabulary takes a good part of a second."""
        self._tokens  # noqa: B018

    def start(self, grammar: str, param: str = "response_format") -> GrammarState:
        """Compile a grammar and return its state before the first token. `param`: the field that asks for it.

        Raises:
            InvalidParameter: the grammar is not valid, or larger than the limits.
            Unsupported: no tokens spell the text that it begins with.
        """
        compiled = self._compiled(grammar)
        if compiled.matcher.is_error():
            said = one_line(compiled.matcher.get_error())
            raise InvalidParameter(f"The grammar is not valid: {said}", param=param)
        return GrammarState(compiled.matcher.deep_copy(), self._speller, param, compiled.first)

    def spell(self, text: str) -> list[int] | None:
        """Return the tokens of a text that a reply must continue with, special tokens by their ids.

        Returns None if its bytes have no spelling.
        """
        ids: list[int] = []
        for special, piece in self.lark.pieces(text):
            spelled = self._speller.spell(piece) if special is None else [special]
            if spelled is None:
                return None
            ids += spelled
        return ids

    def spell_text(self, text: str) -> list[int] | None:
        """Return the tokens of a text, none of them special whatever it spells; None if its bytes have no spelling."""
        return self._speller.spell(text)

    def can_spell(self, text: str) -> bool:
        """Return whether some tokens have the bytes of a text, with special tokens by their ids."""
        texts = [piece for special, piece in self.lark.pieces(text) if special is None]
        return all(self._speller.can_spell(piece.encode("utf-8", "surrogatepass")) for piece in texts)

    def holds_nothing(self, grammar: str) -> bool:
        """Return whether no text satisfies a grammar, as far as its first token tells; False for one that is invalid.

        The grammar is part of another one, so it is not cached, and faults in it are reported for the whole.
        """
        matcher = self._compile(grammar)
        if matcher.is_error():
            return False
        try:
            state = GrammarState(matcher, self._speller, "")
        except Unsupported:
            return False
        if state.accepting:
            return False
        allowed = self.allowed(state)
        allowed[self._ends] = False
        return state.stopped or not allowed.any()

    def bits(self, state: GrammarState) -> NDArray[np.int32]:
        """Compute which tokens may come next, one bit each, int32 `[ceil(vocab_size / 32)]`. Releases Python's lock."""
        bits = np.full((1, (self.vocab_size + 31) // 32), -1, np.int32)
        fill_next_token_bitmask(state._matcher, bits, 0)
        row: NDArray[np.int32] = bits[0]
        return row

    def masks(
        self,
        states: Sequence[GrammarState | None],
        forced: Sequence[int | None],
        known: Mapping[int, NDArray[np.int32]] | None = None,
    ) -> NDArray[np.int32]:
        """Compute which tokens may come next, one bit each: int32 `[len(states), ceil(vocab_size / 32)]`.

        Bit `i % 32` of word `i // 32` is that of token `i`; bits behind the last token mean nothing. Raises nothing:
        `GrammarState.check` raises for a state that hit a limit.

        Args:
            states: one per row; all tokens may follow where it is None.
            forced: per row, the only token that may follow, if there is one.
            known: bits that were computed before, by row.
        """
        known = known or {}
        bits = np.full((len(states), (self.vocab_size + 31) // 32), -1, np.int32)
        for i, row in known.items():
            bits[i] = row
        free = [(s._matcher, i) for i, s in enumerate(states) if s is not None and forced[i] is None and i not in known]
        if len(free) == 1:  # no other thread has to be woken
            fill_next_token_bitmask(free[0][0], bits, free[0][1])
        elif free:
            fill_next_token_bitmask_par(self._threads, free, bits)
        for i, token in enumerate(forced):
            if token is not None:
                bits[i] = 0
                bits.view(np.uint32)[i, token // 32] = 1 << token % 32
        return bits

    def allowed(self, state: GrammarState) -> NDArray[np.bool_]:
        """Return which tokens may come next, bool `[vocab_size]`. `masks` tells the same for many states."""
        bits = self.masks([state], [state.forced])[0].view(np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self.vocab_size].view(np.bool_)

    def check(self, grammar: str, param: str) -> None:
        """Raise `InvalidParameter` for a grammar that cannot be compiled. `param`: the field that asks for it."""
        matcher = self._compiled(grammar).matcher
        if matcher.is_error():
            raise InvalidParameter(f"{param} is not valid: {one_line(matcher.get_error())}", param=param)

    def complaint(self, grammar: str) -> str | None:
        """Return what is wrong with a grammar in llguidance's own form, in its words; None if it compiles."""
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens, limits=_LIMITS)
        return messages[0] if failed else None

    def _compiled(self, grammar: str) -> _Compiled:
        """Compile a grammar, or take it from the cache."""
        return (self._large if len(grammar) > _LARGE else self._small)(grammar)

    def _compile_and_spell(self, grammar: str) -> _Compiled:
        matcher = self._compile(grammar)
        first = [] if matcher.is_error() else matcher.deep_copy().compute_ff_tokens()
        return _Compiled(matcher, array("i", first))

    def _compile(self, grammar: str) -> LLMatcher:
        """Compile a grammar. One that a request brought was tried in a child before (`engine.grammar.trial`)."""
        return LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=_LIMITS)

    @functools.cached_property
    def _tokens(self) -> LLTokenizer:
        return self._own_table.tokenizer(self._spelled)

    @functools.cached_property
    def _speller(self) -> Speller:
        return Speller(self._own_table.tokens, self._encode, lambda text: self._tokens.greedy_tokenize(text))

    @functools.cached_property
    def _own_table(self) -> TokenTable:
        return self.table()

    def _spelled(self, text: str) -> list[int]:
        # llguidance asks for a first spelling while the tokenizer is being made. Of a text without one it hears no
        # tokens; `GrammarState` finds out.
        return (self._speller.spell(text) or []) if "_tokens" in self.__dict__ else []

    @functools.cached_property
    def _threads(self) -> LLExecutor:
        return LLExecutor()

"""What a reply may be: grammars, compiled and followed by llguidance. Knows token ids and bytes; no torch, no HTTP.

    Constraint ──grammar_of──▶ Lark text ──GrammarCompiler.start──▶ GrammarState, one per choice
                                                   masks for a batch, tokens that are forced

A grammar is a text (llguidance's dialect of Lark, https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md),
so that it crosses from the preparer to the engine as plain data and is a key of the cache of compiled ones.
"""

from __future__ import annotations

import functools
import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance import TokenizerWrapper as _Wrapper
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from engine.errors import InvalidParameter
from engine.grammar.paths import check_rules, check_schema_path
from engine.replies.reasoning import ReasoningFormat
from engine.text.json_schema import at, check_depth, check_schema, parts
from engine.text.vocabulary import Vocabulary
from engine.types.requests import Constraint

__all__ = ["GrammarCompiler", "GrammarState", "TokenTable", "check_bounds", "json_rule", "literal", "quoted"]

WHITE_SPACE: Final = r"(\x20|\n\x20{0,32}|\n\t{0,8})?"
"""Between the tokens of a JSON text: nothing, a space, or a new line and its indentation. Without a bound a model that
is sure of nothing writes blanks until its limit."""

MAX_BYTES: Final = 256 * 1024
"""Of a schema, an expression or a grammar as JSON."""
MAX_CHOICES: Final = 1_900
"""Texts to choose from: as many items are in a row of the parser, which holds 2,000."""
_LARGE: Final = 32 * 1024
"""Characters of a grammar from which it is large: compiled, it takes some 220 bytes a character."""
_SMALL_KEPT: Final = 128  # compiled grammars, of 4 to 10 MiB
_LARGE_KEPT: Final = 8
_BLAMED: Final = 400  # parts of a schema that are compiled alone to find the one at fault
_RELAXED: Final = 64  # keywords that are left out of a schema one by one
_COMPILED: Final = 20_000_000  # characters of schemas that are compiled to find the fault in one

_SLICES: Final = (
    r"[\x20\x0A\x0D\x09]+", r'[^"\\\x00-\x1F\x7F<]{1,10}', r'[^"\\\x00-\x1F\x7F<]{1,30}',
    r'[^"\\\x00-\x1F\x7F]{1,10}', r'[^"\\\x00-\x1F\x7F]{1,30}', r'[^"\\\x00-\x1F\x7F]+',
)  # fmt: skip
"""Kinds of tokens that a mask takes or leaves as one: llguidance's own, and those of text that cannot begin a tag."""
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

_KEYWORD_OF: Final = (
    # what a complaint of llguidance begins with, the keyword that it is about
    ("oneOf", "oneOf"), ("Unknown format", "format"), ("regex parse error", "pattern"), ("Invalid type", "type"),
    ("Expected positive integer for '", None), ("Unsatisfiable", None), ("Pointer", "$ref"), ("Resource", "$ref"),
)  # fmt: skip


class GrammarState:
    """How far one choice has come in its grammar. Used by one thread at a time.

    `slow` and `ahead` belong to `engine.grammar.mask_worker`: whether its masks take long, and the next one, which is
    being computed.
    """

    __slots__ = ("_matcher", "_pending", "ahead", "slow")

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.slow = False
        self.ahead: Any = None
        self._pending: deque[int] = deque(matcher.compute_ff_tokens())

    @property
    def forced(self) -> int | None:
        """The only token that may come next, if there is but one way to go on.

        It is always the tokenizer's own spelling of the forced text, whoever asks and whenever, so skipping ahead and
        drawing it token by token give the same reply.
        """
        return self._pending[0] if self._pending else None

    @property
    def stopped(self) -> bool:
        """Nothing but the end may come next."""
        return self._matcher.is_stopped()

    @property
    def accepting(self) -> bool:
        """The reply may end here."""
        return self._matcher.is_accepting()

    def consume(self, token_id: int) -> None:
        """Take the token that was chosen.

        Raises:
            InvalidParameter: it is not in the grammar, or the grammar has become too large for its limits.
        """
        if self._pending and self._pending[0] == token_id:
            self._pending.popleft()
        else:
            self._pending.clear()
        if not self._matcher.consume_token(token_id):
            self._fail()
        if not self._pending and not self._matcher.is_stopped():
            self._pending.extend(self._matcher.compute_ff_tokens())

    def _fail(self) -> None:
        raise InvalidParameter(
            f"The grammar cannot be followed any further: {_first_line(self._matcher.get_error())}",
            param="response_format",
            code="grammar_failed",
        )

    def check(self) -> None:
        """Raise what `consume` raises if a limit was reached while a mask was computed."""
        if self._matcher.is_error():
            self._fail()


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps them by content. Safe to use from several threads.

    Args:
        vocabulary: the true bytes of each token.
        vocab_size: columns of the model's logits.
        end_ids: tokens that end a reply; allowed where the grammar is satisfied.
        encode: text → ids without special tokens, to spell forced text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab_size: int,
        end_ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self._set_up({vocabulary.token_text(i): i for i in vocabulary.special_ids if vocabulary.token_text(i)}, end_ids)
        self.vocab_size = vocab_size
        self.table: Callable[[], TokenTable] = lambda: _table(vocabulary, vocab_size, self._special, end_ids)
        self._encode = encode

    @classmethod
    def from_table(cls, table: TokenTable) -> GrammarCompiler:
        """A compiler without a tokenizer: it spells forced text greedily, and is the same in all else."""
        made = cls.__new__(cls)
        made._set_up(table.names, table.ends)
        made.vocab_size = len(table.tokens)
        made.table = lambda: table
        # llguidance asks for a first spelling while the tokenizer is being made.
        made._encode = lambda text: made._tokens.greedy_tokenize(text) if "_tokens" in made.__dict__ else []
        return made

    def fresh(self) -> GrammarCompiler:
        """The same compiler with nothing compiled yet."""
        made = GrammarCompiler.from_table(self.table())
        made._tokens = self._tokens
        return made

    def _set_up(self, names: Mapping[str, int], ends: Sequence[int]) -> None:
        self._ends = list(ends)
        self._special = dict(names)
        self._small = functools.lru_cache(_SMALL_KEPT)(self._compile)
        self._large = functools.lru_cache(_LARGE_KEPT)(self._compile)

    def warm(self) -> None:
        """Make the tokenizer ready now, not with the first grammar: a good part of a second for a large vocabulary."""
        self._tokens  # noqa: B018

    def start(self, grammar: str) -> GrammarState:
        """The state before the first token.

        Raises:
            InvalidParameter: the grammar is not valid, or larger than the limits.
        """
        matcher = self._matcher(grammar)
        if matcher.is_error():
            raise InvalidParameter(
                f"The grammar is not valid: {_first_line(matcher.get_error())}", param="response_format"
            )
        return GrammarState(matcher.deep_copy())

    def holds_nothing(self, grammar: str) -> bool:
        """Whether no text at all satisfies a grammar, as far as its first token tells; not for one that is not valid.

        Such a grammar is a part of another: it is not kept, and what is wrong with it is said of the whole.
        """
        matcher = self._compile(grammar)
        if matcher.is_error() or (state := GrammarState(matcher)).accepting:
            return False
        allowed = self.masks([state], [state.forced])[0]
        allowed[self._ends] = False
        return state.stopped or not allowed.any()

    def bits(self, state: GrammarState) -> NDArray[np.int32]:
        """Which tokens may come next, a bit each, int32 `[ceil(vocab_size / 32)]`. Releases Python's lock meanwhile."""
        bits = np.full((1, (self.vocab_size + 31) // 32), -1, np.int32)
        fill_next_token_bitmask(state._matcher, bits, 0)
        row: NDArray[np.int32] = bits[0]
        return row

    def masks(
        self,
        states: Sequence[GrammarState | None],
        forced: Sequence[int | None],
        known: Mapping[int, NDArray[np.int32]] | None = None,
    ) -> NDArray[np.bool_]:
        """Which tokens may come next, bool `[len(states), vocab_size]`; all of them where there is no state.

        Where a token is forced it is the only one. `known`: by row, bits that have been computed before.

        Raises nothing: a state that hit a limit says so in `check`.
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
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, : self.vocab_size].view(np.bool_)
        for i, token in enumerate(forced):
            if token is not None:
                allowed[i] = False
                allowed[i, token] = True
        return allowed

    def grammar_of(
        self, constraint: Constraint, thoughts: ReasoningFormat | None = None, opened: bool = False
    ) -> tuple[str, tuple[str, ...]]:
        """A request's constraint as a grammar, with the schema's keywords that it does not enforce.

        `thoughts` may stand before the answer, free; they have to end. `opened`: the prompt has begun them.

        Raises:
            InvalidParameter: it cannot be compiled; with `strict`, it cannot be enforced whole. A JSON pointer says
                where.
        """
        if constraint.kind == "grammar":
            check_bounds(constraint)
            self._check(str(constraint.value), constraint.param)
            if thoughts is None or not opened:
                return str(constraint.value), ()
            raise InvalidParameter(
                f"{constraint.param} cannot be combined with thinking; turn that off (reasoning_effort: none).",
                param=constraint.param,
            )
        rules, unenforced = self.text_rules(constraint, thoughts)
        grammar = self.whole(thoughts, opened, "answer: text", rules)
        self._check(grammar, constraint.param)
        return grammar, unenforced

    def text_rules(
        self, constraint: Constraint, thoughts: ReasoningFormat | None, without: str = ""
    ) -> tuple[list[str], tuple[str, ...]]:
        """The rule `text`: an answer that satisfies a constraint; and the keywords that it does not enforce.

        `without`: what an expression may not match and a choice not hold, or it would be read as something else.
        """
        value = constraint.value
        check_bounds(constraint)
        start = f"{self.mark(thoughts.answer_open)} " if thoughts is not None and thoughts.answer_open else ""
        unenforced: tuple[str, ...] = ()
        match constraint.kind:
            case "json":
                rule, unenforced = self.schema_rule(constraint)
                if unenforced:
                    check_schema(value, constraint.param)
            case "regex":
                rule = f"/{regex_to_lark(str(value))}/"
                if without:
                    return [f"text: {start}FORM", f"FORM: {rule} & ~/(.|\\n)*{literal(without)}(.|\\n)*/"], ()
            case "choice":
                if len(value) > MAX_CHOICES:
                    raise InvalidParameter(
                        f"{constraint.param} has {len(value):,} choices; at most {MAX_CHOICES:,} are allowed.",
                        param=constraint.param,
                    )
                if without and any(without in choice for choice in value):
                    raise InvalidParameter(
                        f"{constraint.param}: a choice holds {without!r}, which would be read as a call of a tool.",
                        param=constraint.param,
                    )
                rule = " | ".join(quoted(choice) for choice in value)
            case "grammar":
                raise InvalidParameter(
                    f"{constraint.param} cannot be combined with tools: it is a whole grammar.", param=constraint.param
                )
        return [f"text: {start}form", f"form: {rule}"], unenforced

    def whole(
        self,
        thoughts: ReasoningFormat | None,
        opened: bool,
        answer: str,
        rules: Sequence[str] = (),
        *,
        asides: bool = False,
    ) -> str:
        """A grammar from its rule `answer`, with thoughts before it if there may be some.

        Thoughts that are turns of their own may come twice; with `asides` any number of times, and other turns, too.
        """
        if thoughts is None:
            return "\n".join(["start: answer", answer, *rules])
        start = "rest" if opened else "thoughts?"
        opening = f"thoughts: {self.mark(thoughts.open)} rest"
        if thoughts.resume:
            openings = " | ".join(self.mark(mark) for mark in (thoughts.open, *(thoughts.asides if asides else ())))
            opening = f"thoughts: ({openings}) rest resume\nresume: {self.mark(thoughts.resume)}"
            again = "thoughts*" if asides else "thoughts? thoughts?"
            start = f"rest resume {again}" if opened else again
        return "\n".join([f"start: {start} answer", opening, self._until(thoughts.close), answer, *rules])

    def check(self, grammar: str, param: str) -> None:
        """Raise what `grammar_of` raises for a grammar that cannot be compiled."""
        self._check(grammar, param)

    def schema_rule(self, constraint: Constraint) -> tuple[str, tuple[str, ...]]:
        """The right side of a Lark rule for a JSON schema, and the keywords that it does not enforce.

        Raises: what `enforceable` raises.
        """
        schema, dropped = self.enforceable(constraint)
        return json_rule(schema), dropped

    def enforceable(self, constraint: Constraint) -> tuple[Any, tuple[str, ...]]:
        """A JSON schema without the keywords that cannot be enforced, and the pointers of those.

        Raises:
            InvalidParameter: it is no schema; with `strict`, it cannot be enforced whole.
        """
        schema = {} if constraint.value is True else constraint.value
        left = [_COMPILED]
        complaint = self._complaint(schema, left)
        if complaint is None:
            return schema, ()
        if constraint.strict:
            raise self._refusal(schema, complaint, constraint.param, left)
        schema = deepcopy(schema)
        dropped: list[str] = []
        for _ in range(_RELAXED):
            where, keyword = self._blame(schema, complaint, left)
            if keyword is None or left[0] <= 0:
                break
            value = at(schema, where)[keyword]
            for pointer, part in list(parts(schema)):
                if (
                    not isinstance(part, dict)
                    or keyword not in part
                    or (keyword == "format" and part[keyword] != value)
                ):
                    continue
                if pointer != where and not complaint.startswith(("Unimplemented", "Unknown")):
                    continue  # these are the same everywhere
                if keyword == "oneOf" and "anyOf" not in part:
                    part["anyOf"] = part.pop("oneOf")  # at least one, instead of exactly one
                else:
                    del part[keyword]
                dropped.append(f"{pointer}/{keyword}")
            complaint = self._complaint(schema, left)
            if complaint is None:
                return schema, tuple(dropped)
        raise self._refusal(schema, complaint, constraint.param, left)

    def mark(self, mark: str) -> str:
        """A mark as the terms of a rule: special tokens by their ids, all else as text."""
        return self.terms(self.pieces(mark))

    def terms(self, pieces: Sequence[tuple[int | None, str]]) -> str:
        """Pieces as the terms of a rule; texts side by side are one."""
        terms: list[str] = []
        text = ""
        for special, piece in [*pieces, (-1, "")]:
            if special is None:
                text += piece
                continue
            if text:
                terms.append(quoted(text))
            text = ""
            terms.append(f"<[{special}]>")
        return " ".join(terms[:-1])

    def _until(self, mark: str) -> str:
        """The rule `rest`: any text up to a mark, the mark, and white space."""
        (special, text), *others = self.pieces(mark)
        if special is None:
            tail = self.mark("".join(t for _, t in others)) if others else ""
            return f"rest: free {tail} SPACE\nfree[suffix={quoted(text)}]: /(.|\\n)*/\nSPACE: /\\s{{0,4}}/"
        free = f"FREE: /(.|\\n)*/ & ~/(.|\\n)*{literal(mark)}(.|\\n)*/"  # nor the mark's letters one by one
        return f"rest: FREE {self.mark(mark)} SPACE\n{free}\nSPACE: /\\s{{0,4}}/"

    def pieces(self, mark: str) -> list[tuple[int | None, str]]:
        """A mark cut at the special tokens in it: (id, name) of one, (None, text) of what lies between."""
        if not self._special:
            return [(None, mark)]
        names = "|".join(re.escape(name) for name in sorted(self._special, key=len, reverse=True))
        return [(self._special.get(piece), piece) for piece in re.split(f"({names})", mark) if piece]

    def _complaint(self, schema: Any, left: list[int]) -> str | None:
        """What is wrong with a schema, in llguidance's words; None if it can be enforced whole.

        `left`: the characters that may still be compiled, counted down.
        """
        try:
            text = json.dumps(schema)
            left[0] -= len(text)
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False})
        except ValueError as error:
            return str(error)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens, limits=_LIMITS)
        return messages[0] if failed else None

    def _blame(self, schema: Any, complaint: str, left: list[int]) -> tuple[str, str | None]:
        """Where the fault is: the pointer of a part of the schema, and the keyword in it if one is known."""
        named = re.match(r"Unimplemented keys: (\[.*\])", complaint)
        if named:
            keys = json.loads(named[1])
            for pointer, part in parts(schema):
                for key in keys:
                    if isinstance(part, Mapping) and key in part:
                        return pointer, key
        deepest = ""
        root = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
        for count, (pointer, part) in enumerate(parts(schema)):
            if count == _BLAMED or left[0] <= 0:
                break
            alone = {**root, **part} if isinstance(part, dict) else part
            found = self._complaint(alone, left) if pointer.startswith(deepest) else None
            if found and found.split(":")[0] == complaint.split(":")[0]:
                deepest = pointer
        part = at(schema, deepest)
        for beginning, keyword in _KEYWORD_OF:
            if complaint.startswith(beginning):
                if keyword is None:
                    quoted = re.search(r"'(\w+)'", complaint)
                    keyword = quoted[1] if quoted else None
                return deepest, keyword if isinstance(part, dict) and keyword in part else None
        return deepest, None

    def _refusal(self, schema: Any, complaint: str, param: str, left: list[int]) -> InvalidParameter:
        where, keyword = self._blame(schema, complaint, left)
        pointer = f"{where}/{keyword}" if keyword else where
        return InvalidParameter(
            f"{param}: at {pointer or 'the root'}: {_first_line(complaint)}. "
            "With strict: false what can be enforced is, and the rest is checked afterwards.",
            param=param,
            code="schema_not_enforceable",
            pointer=pointer,
        )

    def _check(self, grammar: str, param: str) -> None:
        matcher = self._matcher(grammar)
        if matcher.is_error():
            raise InvalidParameter(f"{param} is not valid: {_first_line(matcher.get_error())}", param=param)

    def _matcher(self, grammar: str) -> LLMatcher:
        """A grammar's compiled form, kept by content."""
        return (self._large if len(grammar) > _LARGE else self._small)(grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        """A grammar, compiled; whoever did not write it has tried it in a child first (`engine.grammar.trial`)."""
        return LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=_LIMITS)

    @functools.cached_property
    def _tokens(self) -> LLTokenizer:
        return _tokenizer(self.table(), self._encode)

    @functools.cached_property
    def _threads(self) -> LLExecutor:
        return LLExecutor()


class _Tokens:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int, encode: Callable[[str], list[int]]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def check_bounds(constraint: Constraint) -> None:
    """Raise `InvalidParameter` for what is too deep, too large or too long a chain to be looked at any further."""
    value, param = constraint.value, constraint.param
    check_depth(value, param)
    size = len(value if isinstance(value, str) else json.dumps(value))
    if size > MAX_BYTES:
        raise InvalidParameter(f"{param} has {size} characters; at most {MAX_BYTES} are allowed.", param=param)
    if constraint.kind == "json":
        check_schema_path(value, param)
    elif constraint.kind == "grammar":
        check_rules(str(value), param)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A vocabulary as llguidance sees it: bytes of each token, ids that are no text, names of special ones, ends."""

    tokens: list[bytes]
    special: list[int]
    names: dict[str, int]
    ends: list[int]

    def as_json(self) -> dict[str, Any]:
        """Two long strings instead of as many as there are tokens: it is parsed in a hundredth of a second."""
        return {
            "bytes": b"".join(self.tokens).decode("latin-1"),
            "lengths": [*map(len, self.tokens)],
            "special": self.special,
            "names": self.names,
            "ends": self.ends,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TokenTable:
        data, tokens, start = value["bytes"].encode("latin-1"), [], 0
        for length in value["lengths"]:
            tokens.append(data[start : start + length])
            start += length
        return cls(tokens, value["special"], value["names"], value["ends"])


def _table(vocabulary: Vocabulary, vocab_size: int, names: Mapping[str, int], ends: Sequence[int]) -> TokenTable:
    tokens, special = [], []
    for i in range(vocab_size):
        if i < vocabulary.size and vocabulary.is_text(i):
            tokens.append(vocabulary.token_bytes(i))
        else:
            # 0xff is in no UTF-8 text: how llguidance tells the name of a special token from the same letters.
            name = vocabulary.token_text(i) if i in vocabulary.special_ids else f"<|no token {i}|>"
            tokens.append(b"\xff" + name.encode())
            special.append(i)
    return TokenTable(tokens, special, dict(names), list(ends))


def _tokenizer(table: TokenTable, encode: Callable[[str], list[int]]) -> LLTokenizer:
    wrapper = _Wrapper(_Tokens(table.tokens, table.special, table.ends[0], encode))
    return LLTokenizer(wrapper, n_vocab=len(table.tokens), eos_token=table.ends, slices=list(_SLICES))


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a Lark rule for a JSON schema that can be enforced."""
    guidance = {"whitespace_flexible": True, "whitespace_pattern": WHITE_SPACE}
    return f"%json {json.dumps({**schema, 'x-guidance': guidance})}"


def quoted(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def literal(text: str) -> str:
    """A text as part of an expression between slashes."""
    escaped = re.sub(r"([\\.+*?()|\[\]{}^$/#&~-])", r"\\\1", text)
    return escaped.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]

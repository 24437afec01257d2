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
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import numpy as np
from jsonschema import Draft202012Validator, SchemaError
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance import TokenizerWrapper as _Wrapper
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from referencing import Registry

from engine.detokenizer import Vocabulary
from engine.errors import InvalidParameter
from engine.reasoning import ReasoningFormat
from engine.tool_format import CALL_ID, ToolFormat
from engine.types import Constraint

__all__ = ["GrammarCompiler", "GrammarState", "unenforced_errors"]

WHITE_SPACE: Final = r"(\x20|\n\x20{0,32}|\n\t{0,8})?"
"""Between the tokens of a JSON text: nothing, a space, or a new line and its indentation. Without a bound a model that
is sure of nothing writes blanks until its limit."""

MAX_BYTES: Final = 256 * 1024
"""Of a schema, an expression or a grammar as JSON."""
MAX_DEPTH: Final = 100
_CACHED: Final = 128  # compiled grammars
_BLAMED: Final = 400  # parts of a schema that are compiled alone to find the one at fault
_RELAXED: Final = 64  # keywords that are left out of a schema one by one

_LIMITS: Final = LLParserLimits(verbose_errors=False)

_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES: Final = (
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties",
)  # fmt: skip
_KEYWORD_OF: Final = (
    # what a complaint of llguidance begins with, the keyword that it is about
    ("oneOf", "oneOf"), ("Unknown format", "format"), ("regex parse error", "pattern"), ("Invalid type", "type"),
    ("Expected positive integer for '", None), ("Unsatisfiable", None), ("Pointer", "$ref"), ("Resource", "$ref"),
)  # fmt: skip


class GrammarState:
    """How far one choice has come in its grammar. Used by one thread at a time."""

    __slots__ = ("_matcher", "_pending")

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
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
        self.vocab_size = vocab_size
        self._special = {vocabulary.token_text(i): i for i in vocabulary.special_ids if vocabulary.token_text(i)}
        self._make: Callable[[], LLTokenizer] = lambda: _tokenizer(vocabulary, vocab_size, end_ids, encode)
        self._matcher = functools.lru_cache(_CACHED)(self._compile)

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

    def masks(self, states: Sequence[GrammarState | None], forced: Sequence[int | None]) -> NDArray[np.bool_]:
        """Which tokens may come next, bool `[len(states), vocab_size]`; all of them where there is no state.

        Where a token is forced it is the only one.

        Raises nothing: a state that hit a limit says so in `check`.
        """
        bits = np.full((len(states), (self.vocab_size + 31) // 32), -1, np.int32)
        free = [(s._matcher, i) for i, s in enumerate(states) if s is not None and forced[i] is None]
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
            self._check(str(constraint.value), constraint.param)
            if thoughts is None or not opened:
                return str(constraint.value), ()
            raise InvalidParameter(
                f"{constraint.param} cannot be combined with thinking; turn that off (reasoning_effort: none).",
                param=constraint.param,
            )
        rules, unenforced = self._text(constraint, thoughts)
        grammar = self._after(thoughts, opened, "answer: text", rules)
        self._check(grammar, constraint.param)
        return grammar, unenforced

    def _text(self, constraint: Constraint, thoughts: ReasoningFormat | None) -> tuple[list[str], tuple[str, ...]]:
        """The rule `text`: an answer that satisfies a constraint; and the keywords that it does not enforce."""
        value = constraint.value
        _check_depth(value, constraint.param)
        size = len(value if isinstance(value, str) else json.dumps(value))
        if size > MAX_BYTES:
            raise InvalidParameter(
                f"{constraint.param} has {size} characters; at most {MAX_BYTES} are allowed.", param=constraint.param
            )
        unenforced: tuple[str, ...] = ()
        match constraint.kind:
            case "json":
                rule, unenforced = self.schema_rule(constraint)
                if unenforced:
                    _check_schema(value, constraint.param)
            case "regex":
                rule = f"/{regex_to_lark(str(value))}/"
            case "choice":
                rule = " | ".join(_quoted(choice) for choice in value)
            case "grammar":
                raise InvalidParameter(
                    f"{constraint.param} cannot be combined with tools: it is a whole grammar.", param=constraint.param
                )
        start = f"{self._mark(thoughts.answer_open)} " if thoughts is not None and thoughts.answer_open else ""
        return [f"text: {start}form", f"form: {rule}"], unenforced

    def tool_grammar(
        self,
        found: ToolFormat,
        tools: Sequence[Mapping[str, Any]],
        thoughts: ReasoningFormat | None = None,
        opened: bool = False,
        *,
        free: bool,
        several: bool,
        otherwise: Constraint | None = None,
    ) -> tuple[str, tuple[str, ...]]:
        """Calls of these tools, each with arguments that satisfy its schema; and what `otherwise` does not enforce.

        Args:
            tools: definitions in the API's shape. A schema that cannot be enforced whole is refused with `strict`, else
                enforced as far as it can be.
            free: any text, and a call only once the mark of one has been written; else nothing but calls.
            several: whether another call may follow the first.
            otherwise: what a reply without calls has to be; not with `free`.

        Raises:
            InvalidParameter: a schema that cannot be compiled.
        """
        rules = [self._arguments(found, i, tool["function"]) for i, tool in enumerate(tools)]
        names = " | ".join(f"call_{i}" for i in range(len(tools)))
        close = [self._mark(part) if part else "" for part in found.close.split(CALL_ID)]
        rules.append(f"close: {' ID '.join(close)}" if len(close) > 1 else f"close: {close[0]}")
        rules.append("ID: /[A-Za-z0-9]{9}/")
        rules.append(f"call: {names}")
        more = f"({self._mark(found.between)} {self._mark(found.open)} call)*" if several and found.between else ""
        if several and found.between == "":
            more = f"({self._mark(found.open)} call)*"
        end = self._mark(found.end) if found.end else ""
        if not free:
            rules.append(f"calls: {self._mark(found.begin + found.open)} call {more} {end}")
            if otherwise is None:
                return self._after(thoughts, opened, "answer: calls", rules), ()
            text, unenforced = self._text(otherwise, thoughts)
            return self._after(thoughts, opened, "answer: calls | text", [*rules, *text]), unenforced
        pieces = self._pieces(found.begin + found.open)
        special, mark = pieces[0]
        if special is None:  # a tag that is text: the lexeme ends with the first of it
            tag = found.mark
            head = f"head[lazy]: TEXT {_quoted(tag)}"
            left = (found.begin + found.open)[len(tag) :]
        else:
            head, left = f"head: TEXT <[{special}]>", (found.begin + found.open)[len(mark) :]
        block = f"head {self._mark(left) if left else ''} call {more if found.begin else ''} {end}"
        again = "*" if several else "?"
        rules += [head, "TEXT: /(.|\\n)*/", f"block: {block}"]
        return self._after(thoughts, opened, f"answer: block{again} TEXT", rules), ()

    def _arguments(self, found: ToolFormat, number: int, function: Mapping[str, Any]) -> str:
        """The rules of one tool: what follows the opening of a call, up to its end."""
        param = f"tools.{number}.function.parameters"
        schema = {"type": "object", **(function.get("parameters") or {})}
        head = f"call_{number}: {self._mark(function['name'] + found.middle)}"
        strict = bool(function.get("strict"))
        rule, _ = self.schema_rule(Constraint("json", schema, strict, param))  # refuses what is no schema
        if found.style == "json":
            return f"{head} args_{number} close\nargs_{number}: {rule}"
        # One by one: in the order of the schema, those that are not required may be left out.
        terms, rules = [], []
        required, properties = schema.get("required"), schema.get("properties")
        required = required if isinstance(required, list) else []
        for i, (key, part) in enumerate(properties.items() if isinstance(properties, dict) else ()):
            part = part if isinstance(part, dict) else {}
            name = f"pair_{number}_{i}"
            opening = self._mark(found.key_open + key + found.value_open)
            if part.get("type") == "string" and "enum" not in part:
                rules.append(f"{name}: {opening} {name}_v\n{name}_v[suffix={_quoted(found.value_close)}]: /(.|\\n)*/")
            else:
                local = {**part, **{k: schema[k] for k in ("$defs", "definitions") if k in schema}}
                if isinstance(part.get("enum"), list) and all(isinstance(v, str) for v in part["enum"]):
                    rule = " | ".join(_quoted(v) for v in part["enum"])
                else:
                    rule, _ = self.schema_rule(Constraint("json", local, strict, f"{param}.properties.{key}"))
                rules.append(f"{name}: {opening} {name}_v {self._mark(found.value_close)}\n{name}_v: {rule}")
            terms.append(name if key in required else f"{name}?")
        return "\n".join([f"{head} {' '.join(terms)} close", *rules])

    def _after(self, thoughts: ReasoningFormat | None, opened: bool, answer: str, rules: Sequence[str] = ()) -> str:
        """A grammar from its rule `answer`, with thoughts before it if there may be some."""
        if thoughts is None:
            return "\n".join(["start: answer", answer, *rules])
        start = "start: rest answer" if opened else "start: thoughts? answer"
        opening = f"thoughts: {self._mark(thoughts.open)} rest"
        if thoughts.resume:
            opening = opening.replace(" rest", " rest resume") + f"\nresume: {self._mark(thoughts.resume)}"
            start = start.replace("rest answer", "rest resume answer")
        return "\n".join([start, opening, self._until(thoughts.close), answer, *rules])

    def check(self, grammar: str, param: str) -> None:
        """Raise what `grammar_of` raises for a grammar that cannot be compiled."""
        self._check(grammar, param)

    def schema_rule(self, constraint: Constraint) -> tuple[str, tuple[str, ...]]:
        """The right side of a Lark rule for a JSON schema, and the keywords that it does not enforce."""
        schema = {} if constraint.value is True else constraint.value
        complaint = self._complaint(schema)
        if complaint is None:
            return _json_rule(schema), ()
        if constraint.strict:
            raise self._refusal(schema, complaint, constraint.param)
        schema = deepcopy(schema)
        dropped: list[str] = []
        for _ in range(_RELAXED):
            where, keyword = self._blame(schema, complaint)
            if keyword is None:
                break
            owner = _at(schema, where)
            if keyword == "oneOf" and "anyOf" not in owner:
                owner["anyOf"] = owner.pop("oneOf")  # at least one, instead of exactly one
            else:
                del owner[keyword]
            dropped.append(f"{where}/{keyword}")
            complaint = self._complaint(schema)
            if complaint is None:
                return _json_rule(schema), tuple(dropped)
        raise self._refusal(schema, complaint, constraint.param)

    def _mark(self, mark: str) -> str:
        """A mark as the terms of a rule: special tokens by their ids, all else as text."""
        terms = []
        for special, text in self._pieces(mark):
            terms.append(f"<[{special}]>" if special is not None else _quoted(text))
        return " ".join(terms)

    def _until(self, mark: str) -> str:
        """The rule `rest`: any text up to a mark, the mark, and white space."""
        (special, text), *others = self._pieces(mark)
        if special is None:
            tail = self._mark("".join(t for _, t in others)) if others else ""
            return f"rest: free {tail} SPACE\nfree[suffix={_quoted(text)}]: /(.|\\n)*/\nSPACE: /\\s{{0,4}}/"
        return f"rest: FREE {self._mark(mark)} SPACE\nFREE: /(.|\\n)*/\nSPACE: /\\s{{0,4}}/"

    def _pieces(self, mark: str) -> list[tuple[int | None, str]]:
        """A mark cut at the special tokens in it: (id, name) of one, (None, text) of what lies between."""
        if not self._special:
            return [(None, mark)]
        names = "|".join(re.escape(name) for name in sorted(self._special, key=len, reverse=True))
        return [(self._special.get(piece), piece) for piece in re.split(f"({names})", mark) if piece]

    def _complaint(self, schema: Any) -> str | None:
        """What is wrong with a schema, in llguidance's words; None if it can be enforced whole."""
        try:
            text = json.dumps(schema)
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"lenient": False})
        except ValueError as error:
            return str(error)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens, limits=_LIMITS)
        return messages[0] if failed else None

    def _blame(self, schema: Any, complaint: str) -> tuple[str, str | None]:
        """Where the fault is: the pointer of a part of the schema, and the keyword in it if one is known."""
        named = re.match(r"Unimplemented keys: (\[.*\])", complaint)
        if named:
            keys = json.loads(named[1])
            for pointer, part in _parts(schema):
                for key in keys:
                    if isinstance(part, Mapping) and key in part:
                        return pointer, key
        deepest = ""
        root = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
        for count, (pointer, part) in enumerate(_parts(schema)):
            if count == _BLAMED:
                break
            alone = {**root, **part} if isinstance(part, dict) else part
            found = self._complaint(alone) if pointer.startswith(deepest) else None
            if found and found.split(":")[0] == complaint.split(":")[0]:
                deepest = pointer
        part = _at(schema, deepest)
        for beginning, keyword in _KEYWORD_OF:
            if complaint.startswith(beginning):
                if keyword is None:
                    quoted = re.search(r"'(\w+)'", complaint)
                    keyword = quoted[1] if quoted else None
                return deepest, keyword if isinstance(part, dict) and keyword in part else None
        return deepest, None

    def _refusal(self, schema: Any, complaint: str, param: str) -> InvalidParameter:
        where, keyword = self._blame(schema, complaint)
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

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=_LIMITS)

    @functools.cached_property
    def _tokens(self) -> LLTokenizer:
        return self._make()

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


def _tokenizer(
    vocabulary: Vocabulary, vocab_size: int, end_ids: Sequence[int], encode: Callable[[str], list[int]]
) -> LLTokenizer:
    tokens, special = [], []
    for i in range(vocab_size):
        if i < vocabulary.size and vocabulary.is_text(i):
            tokens.append(vocabulary.token_bytes(i))
        else:
            # 0xff is in no UTF-8 text: how llguidance tells the name of a special token from the same letters.
            name = vocabulary.token_text(i) if i in vocabulary.special_ids else f"<|no token {i}|>"
            tokens.append(b"\xff" + name.encode())
            special.append(i)
    ends = list(end_ids)
    wrapper = _Wrapper(_Tokens(tokens, special, ends[0], encode))
    return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=ends)


def _json_rule(schema: Mapping[str, Any]) -> str:
    guidance = {"whitespace_flexible": True, "whitespace_pattern": WHITE_SPACE}
    return f"%json {json.dumps({**schema, 'x-guidance': guidance})}"


def _quoted(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _parts(schema: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    """A schema and all schemas inside it, each after the one that holds it, with their JSON pointers (RFC 6901)."""
    yield pointer, schema
    if not isinstance(schema, Mapping):
        return
    for key in _SINGLES:
        if isinstance(schema.get(key), Mapping):
            yield from _parts(schema[key], f"{pointer}/{key}")
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            for i, part in enumerate(schema[key]):
                yield from _parts(part, f"{pointer}/{key}/{i}")
    for key in _MAPS:
        if isinstance(schema.get(key), Mapping):
            for name, part in schema[key].items():
                escaped = str(name).replace("~", "~0").replace("/", "~1")
                yield from _parts(part, f"{pointer}/{key}/{escaped}")


def _check_schema(schema: Any, param: str) -> None:
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = "".join(f"/{step}" for step in error.absolute_path)
        raise InvalidParameter(
            f"{param}: at {where or 'the root'}: {_first_line(error.message)}", param=param, pointer=where
        ) from None


def _check_depth(value: Any, param: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
        if not level:
            return
    raise InvalidParameter(f"{param} is nested too deeply; {MAX_DEPTH} levels are allowed.", param=param)


def _children(node: dict[str, Any] | list[Any]) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node


def _at(schema: Any, pointer: str) -> Any:
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        schema = schema[int(step)] if isinstance(schema, list) else schema[step]
    return schema


def unenforced_errors(text: str, schema: Any) -> str | None:
    """Why a finished text does not satisfy a schema; None if it does.

    Expressions are not run: where they can be enforced the grammar has done so, and Python's could run for ever.
    Nothing is fetched: a reference to another document is an error.
    """
    schema = deepcopy(schema)
    for _, part in _parts(schema):
        if isinstance(part, dict):
            part.pop("pattern", None)
            if part.pop("patternProperties", None):
                part.pop("additionalProperties", None)
                part.pop("unevaluatedProperties", None)
    try:
        validator = Draft202012Validator(schema, registry=Registry())
        error = next(iter(validator.iter_errors(json.loads(text))), None)
    except Exception as problem:
        # The validator takes a schema at its word: one that is none can make it raise anything. The text is then
        # unchecked, which is said; nobody else's reply may end for it.
        return _first_line(f"it cannot be checked: {type(problem).__name__}: {problem}")
    return None if error is None else f"{error.json_path}: {error.message}"[:500]


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]

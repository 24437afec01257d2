"""`GrammarTrial`: tries each request's grammar in a child process before the server compiles it. No torch, no HTTP.

    GrammarSource ──▶ GrammarTrial.grammar ══ child: reply_grammar, compile on a small stack, walk ══▶ ReplyGrammar

The cost of an expression or a schema cannot be seen in its text: some overflow the compiler's stack, some take
gigabytes, some are slow at each token. The child (`engine.confined.process`) does all that the server would do, with
bounds on processor time and memory and on a stack smaller than any in the server; then it takes a few dozen tokens and
measures the masks. Only then the server compiles the grammar's text, within the same counts. These clocks can only
refuse a request, and only before its reply has begun. Outcomes are cached by content.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engine.confined.process import Confined, ConfinedError, ConfinedFault
from engine.errors import InvalidParameter, Unavailable, Unsupported
from engine.grammar.answer_grammar import ReplyGrammar
from engine.grammar.compiler import STEP_FUEL, GrammarCompiler, GrammarState
from engine.grammar.reply_grammar import GrammarSource, reply_grammar
from engine.grammar.token_table import TokenTable
from engine.text.json_schema import check_depth

__all__ = ["GrammarTrial"]

SECONDS: Final = 5.0
"""Seconds of processor time for one request's grammar, with the search for a fault in its schemas. A schema of 300
properties takes 0.1, 128 tools of ten parameters 0.9. The limit is five times what honest requests take, or a busy
machine would refuse what another serves."""
MEMORY: Final = 512 << 20  # bytes for one request's grammar; 6,000 properties take 65 MiB
STACK: Final = 3 << 19
"""Bytes of stack in the child: less than any thread of the server has (2 MiB: llguidance's own, and all under
`ulimit -s unlimited`), more than `MAX_PATH` steps take."""
_COMPILE_SECONDS: Final = 2.0
"""Seconds of processor time to compile the whole grammar: the engine's thread may have to compile it again while all
others wait. 128 tools take 0.22, a constant of 250,000 characters 0.38."""
_STEP_SECONDS: Final = 0.25  # for one token of the walk: the mask and what follows from it
_STEPS: Final = 16  # tokens of one walk
_WALK_SECONDS: Final = 0.4  # for all of them; 300 optional properties take 0.03
_WALKS: Final = 2
_FORCED: Final = 100_000  # forced tokens in a row, after which a walk ends: more than a schema can hold
_KEPT: Final = 32 << 20  # characters of outcomes
_POINTERS: Final = 16  # of keywords that are not enforced; that there are some is what counts
_NAMES: Final = 64  # of keywords that a client is told of
_MOST: Final = 1_000_000  # characters of a request's tools and constraint together


class GrammarTrial:
    """Makes the grammars of one model's requests. Safe to use from several threads; its child starts when needed."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._child = Confined(
            "grammars",
            seconds=SECONDS,
            memory_bytes=MEMORY,
            stack_bytes=64 << 20,
            kept=(f"{__name__}:keep", lambda: compiler.table().as_json()),
        )
        self._lock = threading.Lock()  # of `_outcomes`
        self._outcomes: OrderedDict[bytes, tuple[dict[str, Any], int]] = OrderedDict()  # with their sizes
        self._size = 0

    def warm(self) -> None:
        """Start the child and build the tokenizer, before the first request needs them."""
        self._child.start()
        self._compiler.warm()

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def grammar(self, source: GrammarSource) -> ReplyGrammar:
        """Make the grammar of a reply.

        Raises:
            InvalidParameter: it cannot be compiled or enforced, or exceeds the limits.
        """
        if not source.tools and source.constraint is not None and source.constraint.value is True:
            return reply_grammar(self._compiler, source)  # any JSON object: no part of it is the request's
        told = _written(source)
        key = hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()
        outcome = self._known(key)
        if outcome is None:
            outcome, passing = self._try(source, told)
            if not passing:
                self._keep(key, outcome)
        if "text" not in outcome:
            kind = Unsupported if outcome["kind"] == "Unsupported" else InvalidParameter
            raise kind(outcome["message"], param=outcome["param"], code=outcome["code"], **outcome["details"])
        told_of = tuple(outcome["unenforced"]), frozenset(outcome["unenforced_tools"]), tuple(outcome["left_out"])
        made = ReplyGrammar(outcome["text"], *told_of)
        self._compiler.check(made.text, source.param)
        return made

    def _known(self, key: bytes) -> dict[str, Any] | None:
        with self._lock:
            if key not in self._outcomes:
                return None
            self._outcomes.move_to_end(key)
            return self._outcomes[key][0]

    def _keep(self, key: bytes, outcome: dict[str, Any]) -> None:
        size = 1000 + len(json.dumps(outcome))
        with self._lock:
            self._size += size - self._outcomes.pop(key, ({}, 0))[1]
            self._outcomes[key] = outcome, size
            while self._size > _KEPT:
                self._size -= self._outcomes.popitem(last=False)[1][1]

    def _try(self, source: GrammarSource, told: str) -> tuple[dict[str, Any], bool]:
        """Try a grammar; return the outcome, and whether the same source may have another outcome later."""
        try:
            found: dict[str, Any] = self._child.call(f"{__name__}:made", told)
        except RuntimeError as error:
            raise Unavailable(str(error)) from None
        except ConfinedFault as fault:
            what = str(fault)
            if "SIGSEGV" in what or "SIGBUS" in what:
                what = f"is nested too deeply, or too large, to compile: {STACK / (1 << 20):g} MiB of stack are allowed"
            refused = InvalidParameter(
                f"{source.param}: its grammar {what}.", param=source.param, code="grammar_too_costly"
            )
            return _refused(refused), fault.passing
        except ConfinedError as error:
            if error.kind != "PanicException":
                raise RuntimeError(f"a grammar's trial raised {error.kind}: {error}") from None
            return _refused(
                InvalidParameter(f"{source.param}: its compiler gave up: {error}"[:300], param=source.param)
            ), False
        return found, False


class _CostlyError(Exception):
    """A grammar exceeds a limit. The message continues `its grammar …`."""


def _refused(error: InvalidParameter) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "param": error.param,
        "code": error.code,
        "details": error.details,
    }


def _written(source: GrammarSource) -> str:
    """Write a source as JSON, which is sent to the child and is the key of its outcome."""
    for i, tool in enumerate(source.tools):
        check_depth(tool.parameters, f"tools.{i}.function.parameters")
    if source.constraint is not None:
        check_depth(source.constraint.value, source.constraint.param)
    try:
        text = json.dumps(source.as_json(), separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameter(f"{source.param} is not JSON: {error}", param=source.param) from None
    if len(text) > _MOST:
        raise InvalidParameter(f"{source.param}: {len(text):,} characters of schemas; at most {_MOST:,} are allowed.",
                               param=source.param)  # fmt: skip
    return text


# -- in the child -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kept:
    compiler: GrammarCompiler
    lengths: NDArray[np.int64]
    """Bytes of each token."""
    closing: NDArray[np.bool_]
    """Tokens that may end something: a walk avoids them, to see more of the grammar."""
    ends: NDArray[np.bool_]


def keep(table: dict[str, Any]) -> _Kept:
    """Prepare what all trials of a model share."""
    found = TokenTable.from_json(table)
    compiler = GrammarCompiler.from_table(found)
    compiler.start("start: /a/")
    lengths = np.array([len(token) for token in found.tokens])
    closing = np.array([any(letter in token for letter in b'"}])>') for token in found.tokens])
    ends = np.zeros_like(closing)
    ends[found.ends] = True
    return _Kept(compiler, lengths, closing | ends, ends)


def made(told: str, kept: _Kept) -> dict[str, Any]:
    """Make and try a source's grammar; return it, or why it is refused."""
    source = GrammarSource.from_json(json.loads(told))
    try:
        grammar = reply_grammar(kept.compiler, source)
        _on_a_small_stack(lambda: _followed(kept, grammar.text, source.param))
    except InvalidParameter as error:
        return _refused(error)
    except _CostlyError as error:
        return _refused(
            InvalidParameter(f"{source.param}: its grammar {error}.", param=source.param, code="grammar_too_costly")
        )
    return {
        "text": grammar.text,
        # Thousands, each a long one, may be.
        "unenforced": [pointer[:200] for pointer in grammar.unenforced[:_POINTERS]],
        "unenforced_tools": sorted(grammar.unenforced_tools),
        "left_out": [name[:300] for name in grammar.left_out[:_NAMES]],
    }


def _on_a_small_stack(function: Any) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    threading.stack_size(STACK)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _followed(kept: _Kept, text: str, param: str) -> None:
    try:
        _walk(kept, text, param)
    except Unsupported:  # no tokens spell it
        raise
    except InvalidParameter as error:  # its words are about a reply, and there is none yet
        said = re.split("; (?:consider|try) | <", error.message.partition(": ")[2])[0]
        said = said.replace("constructed", f"constructed; max is {STEP_FUEL:,}")
        raise _CostlyError(f"goes beyond the limits of a step: {said}") from None


def _walk(kept: _Kept, text: str, param: str) -> None:
    """Compile a grammar with an empty cache and follow it for some tokens.

    Raises:
        _CostlyError: it takes too long, or exceeds the counts that bound a reply.
        InvalidParameter: it cannot be followed; names `param`.
    """
    compiler = kept.compiler.fresh()
    began = time.thread_time()
    compiler.start(text, param)
    if (took := time.thread_time() - began) > _COMPILE_SECONDS:
        raise _CostlyError(f"takes {took:.1f} seconds to compile; at most {_COMPILE_SECONDS:g} are allowed")
    for walk in range(_WALKS):
        state, spent, steps = compiler.start(text, param), 0.0, 0
        while steps < _STEPS and (cost := _step(kept, compiler, state, walk, steps)) is not None:
            spent, steps = spent + cost, steps + 1
            if cost > _STEP_SECONDS:
                raise _CostlyError(f"takes {cost:.2f} seconds for one token; at most {_STEP_SECONDS:g} are allowed")
            if spent > _WALK_SECONDS:
                raise _CostlyError(
                    f"takes {spent:.2f} seconds for {steps} tokens; at most {_WALK_SECONDS:g} for {_STEPS} are allowed"
                )


def _step(kept: _Kept, compiler: GrammarCompiler, state: GrammarState, walk: int, step: int) -> float | None:
    """Take the forced tokens and one more; return that one's seconds, or None if the grammar has ended.

    The first walk takes any token, later ones short tokens.
    """
    taken = 0
    while state.forced is not None and not state.stopped and taken < _FORCED:
        state.consume(state.forced)
        taken += 1
    if state.stopped or state.forced is not None:
        return None
    began = time.thread_time()
    allowed = compiler.allowed(state)
    state.check()
    inside = np.flatnonzero(allowed & ~kept.closing)
    choices = inside if len(inside) else np.flatnonzero(allowed & ~kept.ends)
    if not len(choices):
        return None
    if walk:
        choices = choices[kept.lengths[choices] == kept.lengths[choices].min()]
    state.consume(int(choices[(7919 * (step + 1)) % len(choices)]))
    return time.thread_time() - began

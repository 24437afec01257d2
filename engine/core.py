"""`EngineCore`: requests in, tokens out, one step at a time. Synchronous: no thread, no clock, no I/O.

A step is schedule, forward, sample, commit, return. What goes wrong in it ends one request, not the engine: a step that
does not fit in memory ends its largest request and recomputes the others; keys that are not finite end theirs.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from engine.compute.model_runner import ForwardResult
from engine.errors import NumericalFault, OutOfMemory, ReplyFault, VerbatimError, out_of_memory, panicked
from engine.grammar.compiler import GrammarCompiler, GrammarState
from engine.grammar.mask_worker import MaskWorker
from engine.model import LoadedModel
from engine.replies.chat_format import ChatFormat
from engine.replies.reply_stream import TextDelta, TextStream
from engine.replies.tool_calls import call_id
from engine.sampling.sampler import Sampled, Sampler
from engine.scheduling.drafts import Drafter
from engine.scheduling.scheduler import Chunk, Schedule
from engine.scheduling.sequence import Sequence, SequenceState
from engine.text.json_schema import unenforced_errors
from engine.text.stop_strings import StopStrings
from engine.text.vocabulary import Vocabulary
from engine.types.messages import ToolCall
from engine.types.model_info import EngineStats
from engine.types.outputs import ChoiceDelta, FinishReason, RequestOutput, TokenLogprob, TopLogprob, Usage
from engine.types.requests import PreparedRequest
from engine.types.sampling_params import SamplingParams

log = logging.getLogger("verbatim.engine")


@dataclass(slots=True)
class _Choice:
    """One running choice: its sequence, its text, and what it is held to."""

    sequence: Sequence
    text: TextStream
    grammar: GrammarState | None
    closing: deque[int] = field(default_factory=deque)
    """Tokens that come next whatever the model says: the end of thoughts that grew too long."""
    thoughts: int = 0
    """Tokens of thought so far."""
    calls: int = 0
    """Tool calls so far."""
    written: list[str] = field(default_factory=list)
    """The text so far, where it is to be checked against a schema in the end."""
    drafter: Drafter | None = None
    """Guesses its next tokens, where that is switched on and nothing else holds it."""
    schema_error: str | None = None
    """What is wrong with the calls so far that no grammar held to all of their schema; empty: nothing."""

    @property
    def forced(self) -> int | None:
        """The only token that may come next, if there is but one."""
        return self.closing[0] if self.closing else self.grammar.forced if self.grammar else None


@dataclass(slots=True)
class _Running:
    """One request in the engine. Owns its choices."""

    request: PreparedRequest
    choices: list[_Choice]
    unfinished: int
    completion_tokens: int = 0
    prompt_tokens: int = 0
    """Of the prompt, how far it was computed at most, what the cache held included."""

    def usage(self) -> Usage:
        """What was computed; of a request that has drawn a token, the whole prompt."""
        prompt = len(self.request.prompt_token_ids) if self.completion_tokens else self.prompt_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.completion_tokens,
            cached_tokens=min(self.choices[0].sequence.num_cached, prompt),
            reasoning_tokens=sum(choice.thoughts for choice in self.choices),
        )


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A sequence as it will be if its guesses are right: what the sampler asks of a row."""

    sequence: Sequence
    guessed: tuple[int, ...]

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params

    @property
    def seed(self) -> int:
        return self.sequence.seed

    @property
    def choice_index(self) -> int:
        return self.sequence.choice_index

    @property
    def position(self) -> int:
        return self.sequence.position + len(self.guessed)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.sequence.prompt_token_ids

    @property
    def output_counts(self) -> Counter[int]:
        return self.sequence.output_counts + Counter(self.guessed)


class EngineCore:
    """Continuous batching over one model. Not safe to call from two threads."""

    def __init__(self, model: LoadedModel) -> None:
        self._scheduler = model.scheduler
        self._runner = model.runner
        self._vocabulary: Vocabulary = model.vocabulary
        self._grammars: GrammarCompiler = model.grammars
        self._masks = MaskWorker(model.grammars)
        self._chat_format = model.chat_format
        self._thought_marks = _marks(self._vocabulary, self._chat_format, calls=False)
        self._marks = _marks(self._vocabulary, self._chat_format, calls=True)
        self._closing_ids = model.closing_ids
        self._end_ids = frozenset(model.end_ids)
        self._sampler = Sampler(
            model.info.vocab_size,
            model.vocabulary.invalid_ids(model.info.vocab_size),
            model.end_ids,
            model.device,
        )
        self._speculates = _may_speculate(model)
        self._requests: dict[str, _Running] = {}
        self._steps = 0
        self._drafted_tokens = 0
        self._accepted_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: PreparedRequest) -> None:
        """Queue a request. Its id must not be in use."""
        if request.request_id in self._requests:
            raise ValueError(f"the request id {request.request_id!r} is in use")
        params = request.params
        assert params.seed is not None
        stops = StopStrings(params.stop)
        choices = [
            _Choice(
                Sequence(
                    request.request_id,
                    i,
                    request.prompt_token_ids,
                    params,
                    params.seed,
                    group=request.group,
                    share=request.cache_share,
                ),
                self._text(stops, request),
                self._grammars.start(request.grammar) if request.grammar else None,
            )
            for i in range(params.n)
        ]
        for choice in choices:
            self._close_thoughts(choice)
            if self._speculates and choice.grammar is None and params.thinking_budget is None:
                choice.drafter = Drafter()
        self._requests[request.request_id] = _Running(request, choices, len(choices))
        self._scheduler.add([choice.sequence for choice in choices])

    def _text(self, stops: StopStrings, request: PreparedRequest) -> TextStream:
        parser = self._chat_format.parser(
            {tool["function"]["name"]: tool["function"] for tool in request.tools},
            parallel=request.parallel_tool_calls,
            exact=request.grammar is not None,
            first=request.calls_first,
            chat=request.chat,
            opened=request.thinks,
            opening=request.opening,
        )
        return TextStream(self._vocabulary, stops, parser, self._marks if request.tools else self._thought_marks)

    def abort(self, request_id: str) -> Usage | None:
        """Forget a request, wherever it is; its blocks are free at once.

        Returns what it has used; None, and nothing is done, if it is gone.
        """
        running = self._requests.pop(request_id, None)
        if running is None:
            return None
        for choice in running.choices:
            self._leave(choice.sequence)
        return running.usage()

    def queued(self) -> list[str]:
        """The requests of which nothing has been computed yet."""
        return [
            request_id
            for request_id, running in self._requests.items()
            if running.choices[0].sequence.state is SequenceState.WAITING and not running.choices[0].sequence.position
        ]

    def refuse(self, request_id: str, error: VerbatimError) -> RequestOutput:
        """End a request with an error."""
        return self._fail(request_id, error)

    def step(self) -> list[RequestOutput]:
        """Compute one step; one output for each request that it advanced or ended."""
        self._propose()
        held = self._held()
        schedule = self._scheduler.schedule(held)
        if held and not schedule.chunks:
            self._masks.rest(held.values())
        drawers = [_drawers(chunk) for chunk in schedule.chunks]
        try:
            result = self._forward(schedule)
            sampled = self._sample(schedule, drawers, result)
        except BaseException as error:
            if panicked(error):
                return self._drop_grammars(schedule, error)
            if not out_of_memory(error):
                raise
            return self._drop_largest(schedule, error)
        return self._commit(schedule, drawers, result, sampled)

    def close(self) -> None:
        """Begin nothing further beside the steps."""
        self._masks.close()

    def stats(self) -> EngineStats:
        pool = self._scheduler.pool
        return EngineStats(
            alive=True,
            stalled=False,
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            steps=self._steps,
            preemptions=self._scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free,
        )

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _forward(self, schedule: Schedule) -> ForwardResult:
        if not schedule.chunks:
            return ForwardResult(torch.empty(0, self._runner.vocab_size), ())
        return self._runner.forward(schedule)

    def _held(self) -> dict[Sequence, GrammarState]:
        """Sequences that are left out of this step, for their grammars are at work; preempted ones stand in front."""
        preempted = takewhile(lambda sequence: sequence.position, self._scheduler.waiting)
        return {
            sequence: grammar
            for sequence in (*self._scheduler.running, *preempted)
            if (grammar := self._choice(sequence).grammar) is not None and self._masks.waits(grammar)
        }

    def _propose(self) -> None:
        """Let sequences that decode guess their next tokens."""
        if not self._speculates:
            return
        for sequence in self._scheduler.running:
            drafter = self._choice(sequence).drafter
            if drafter is not None and sequence.num_uncomputed == 1 and sequence.position:
                most = (sequence.params.max_tokens or 0) - sequence.position - 1
                sequence.draft = drafter.propose(sequence, most)

    def _sample(
        self, schedule: Schedule, drawers: list[list[Sequence]], result: ForwardResult
    ) -> list[Sampled | VerbatimError]:
        """One draw for each sequence of each chunk that samples, and one for each of its guesses.

        The choices of a prompt draw from one row.
        """
        rows: list[Sequence | _Ahead] = []
        owners: list[int] = []
        row = 0
        for chunk, group in zip(schedule.chunks, drawers, strict=True):
            rows += group
            owners += [row] * len(group)
            row += bool(group)
            for number in range(len(chunk.draft) if group else 0):
                rows.append(_Ahead(chunk.sequence, chunk.draft[: number + 1]))
                owners.append(row)
                row += 1
        if not rows:
            return []
        return self._sampler.sample(result.logits, rows, owners, self._allowed(rows))

    def _choice(self, sequence: Sequence | _Ahead) -> _Choice:
        return self._requests[sequence.request_id].choices[sequence.choice_index]

    def _allowed(self, rows: list[Sequence | _Ahead]) -> Tensor | None:
        """What grammars and forced tokens leave, bool `[rows, vocab_size]`; None where that is everything.

        Computed after the forward pass was started: on a GPU, while it runs.
        """
        choices = [self._choice(sequence) for sequence in rows]
        if not any(choice.grammar or choice.closing for choice in choices):
            return None
        masks = self._masks.masks([c.grammar for c in choices], [c.forced for c in choices])
        return torch.from_numpy(masks).to(self._sampler.device)

    def _commit(
        self,
        schedule: Schedule,
        drawers: list[list[Sequence]],
        result: ForwardResult,
        sampled: list[Sampled | VerbatimError],
    ) -> list[RequestOutput]:
        """Note what was computed, append what was drawn, tell what happened; a fault ends its request."""
        self._steps += 1
        draws = iter(sampled)
        faults: dict[str, VerbatimError] = {}
        drawn: list[tuple[Sequence, list[Sampled | VerbatimError], tuple[int, ...]]] = []
        for number, (chunk, group, finite) in enumerate(zip(schedule.chunks, drawers, result.finite, strict=True)):
            if number in result.errors:
                faults[chunk.sequence.request_id] = result.errors[number]
            elif not finite:
                faults[chunk.sequence.request_id] = NumericalFault(
                    "the model computed keys or values that are not finite; its weights may be damaged."
                )
            for sequence in group:
                first = next(draws)
                if isinstance(first, VerbatimError):
                    faults.setdefault(sequence.request_id, first)
                drawn.append((sequence, [first, *(next(draws) for _ in chunk.draft)], chunk.draft))
        outputs = [self._fail(request_id, error) for request_id, error in faults.items()]
        self._count_prompt_tokens(schedule)
        self._scheduler.commit(schedule)
        deltas: dict[str, list[ChoiceDelta]] = {}
        for sequence, found, draft in drawn:
            request_id = sequence.request_id
            if request_id in faults:
                continue
            try:
                deltas.setdefault(request_id, []).extend(self._advance_all(sequence, found, draft))
            except BaseException as error:  # its grammar cannot go on; other faults stay this request's, too
                if not isinstance(error, Exception) and not panicked(error):
                    raise
                faults[request_id] = fault = reply_fault(request_id, error)
                deltas.pop(request_id, None)
                outputs.append(self._fail(request_id, fault))
        return outputs + [self._output(request_id, parts) for request_id, parts in deltas.items()]

    def _advance_all(
        self, sequence: Sequence, draws: list[Sampled | VerbatimError], draft: tuple[int, ...]
    ) -> list[ChoiceDelta]:
        """Append what was drawn as long as it is what was guessed, and the first token that is not."""
        deltas: list[ChoiceDelta] = []
        for draw, guess in zip(draws, (*draft, None), strict=True):
            if isinstance(draw, VerbatimError):
                raise draw
            deltas.append(self._advance(sequence, draw))
            if deltas[-1].finish_reason or draw.token_id != guess:
                break
            self._scheduler.accept(sequence)
        if draft:
            accepted = len(deltas) - 1
            drafter = self._choice(sequence).drafter
            assert drafter is not None
            drafter.learn(len(draft), accepted)
            self._drafted_tokens += len(draft)
            self._accepted_tokens += accepted
        return deltas

    def _advance(self, sequence: Sequence, draw: Sampled) -> ChoiceDelta:
        """Append a token to a choice, and those that are forced after it; say what they add to the answer."""
        running, choice = self._requests[sequence.request_id], self._choice(sequence)
        params, text = sequence.params, choice.text
        if choice.grammar:
            choice.grammar.check()
        logprobs = (self._logprob(draw, text),) if params.logprobs else None
        tokens = [draw.token_id]
        delta, finish = self._append(running, choice, draw.token_id)
        # Log-probabilities need a forward pass: with them a forced token is drawn, with no other to choose from.
        while finish is None and not params.logprobs and (forced := choice.forced) is not None:
            tokens.append(forced)
            more, finish = self._append(running, choice, forced)
            delta = _together(delta, more)
        if choice.grammar is not None and not finish and choice.forced is None:
            self._masks.look_ahead(choice.grammar)
        if finish:
            rest = text.finish()
            delta = _together(delta, rest)
            self._leave(sequence)
            running.unfinished -= 1
            finish = "stop" if rest.stopped else finish  # half a character, cut, may still complete a stop string
        calls = tuple(self._call(running.request, choice, *call) for call in delta.calls)
        if finish == "stop" and choice.calls:
            finish = "tool_calls"
        if running.request.unenforced_schema is not None:
            choice.written.append(delta.text)
            if finish and not choice.calls:
                written = "".join(choice.written)
                choice.schema_error = unenforced_errors(written, running.request.unenforced_schema) or ""
        return ChoiceDelta(
            index=sequence.choice_index,
            text=delta.text,
            token_ids=tuple(tokens),
            logprobs=logprobs,
            finish_reason=finish,
            reasoning=delta.reasoning,
            tool_calls=calls,
            schema_error=choice.schema_error if finish else None,
        )

    def _call(self, request: PreparedRequest, choice: _Choice, name: str, arguments: str) -> ToolCall:
        sequence = choice.sequence
        choice.calls += 1
        if name in request.unenforced_tools and not choice.schema_error:
            [schema] = [t["function"].get("parameters") for t in request.tools if t["function"]["name"] == name]
            error = unenforced_errors(arguments, schema)
            choice.schema_error = f"{name}: {error}" if error else ""
        found = call_id(sequence.seed, sequence.choice_index, sequence.prompt_token_ids, choice.calls)
        return ToolCall(found, name, arguments)

    def _append(self, running: _Running, choice: _Choice, token: int) -> tuple[TextDelta, FinishReason | None]:
        """Append one token to a choice: what it shows, and whether the choice ends with it."""
        sequence, params, text = choice.sequence, choice.sequence.params, choice.text
        sequence.append(token)
        running.completion_tokens += 1
        self._generated_tokens += 1
        if choice.closing:
            choice.closing.popleft()
        choice.thoughts += text.thinking
        ends = token in self._end_ids and not params.ignore_eos
        if token in params.stop_token_ids or (ends and (choice.grammar is None or choice.grammar.accepting)):
            return TextDelta("", False, b""), "stop"  # the token adds no text
        before = text.thinking
        delta = text.push(token, sequence.position > params.min_tokens)
        stopped = delta.stopped or bool(delta.calls and not running.request.parallel_tool_calls)
        choice.thoughts += text.thinking and not before  # the token that opened them
        if choice.grammar is not None and not stopped:
            choice.grammar.consume(token)
            stopped = choice.grammar.stopped  # nothing but the end could follow, so nothing is drawn for it
        self._close_thoughts(choice)
        return delta, "stop" if stopped else "length" if sequence.position == params.max_tokens else None

    def _close_thoughts(self, choice: _Choice) -> None:
        """Force the end of thoughts that have used up their budget; a grammar takes it after whole characters only."""
        budget = choice.sequence.params.thinking_budget
        if budget is None or not choice.text.thinking or choice.thoughts < budget or choice.closing:
            return
        if choice.grammar is None or choice.text.whole:
            choice.closing.extend(self._closing_ids)

    def _logprob(self, draw: Sampled, text: TextStream) -> TokenLogprob:
        """A drawn token and its rivals, with the bytes each would add at this place of the text."""
        assert draw.logprob is not None
        words = self._vocabulary
        top = []
        for token, value in draw.top:
            data = text.token_bytes(token)
            top.append(TopLogprob(token, words.token_text(token, data), data, value))
        data = text.token_bytes(draw.token_id)
        return TokenLogprob(draw.token_id, words.token_text(draw.token_id, data), data, draw.logprob, tuple(top))

    def _output(self, request_id: str, deltas: list[ChoiceDelta]) -> RequestOutput:
        running = self._requests[request_id]
        finished = running.unfinished == 0
        if finished:
            del self._requests[request_id]
        return RequestOutput(request_id, tuple(deltas), running.usage(), finished)

    # -- ends ---------------------------------------------------------------------------------------------------

    def _leave(self, sequence: Sequence, *, reusable: bool = True) -> None:
        self._scheduler.finish(sequence, reusable=reusable)
        self._runner.forget(sequence)

    def _fail(self, request_id: str, error: VerbatimError) -> RequestOutput:
        running = self._requests.pop(request_id)
        for choice in running.choices:
            self._leave(choice.sequence, reusable=False)
        return RequestOutput(request_id, (), running.usage(), True, error)

    def _drop_largest(self, schedule: Schedule, error: BaseException) -> list[RequestOutput]:
        """A step did not fit in memory: end the request that asked for most of it, recompute the others."""
        self._undo(schedule)
        self._runner.release_memory()
        largest = max(schedule.chunks, key=lambda c: (c.count, c.start))
        reason = OutOfMemory(
            f"memory ran out in a step that computed {largest.count} tokens of this request at position "
            f"{largest.start}; a lower max_batch_tokens or context_length needs less. ({_first_line(error)})"
        )
        return [self._fail(largest.sequence.request_id, reason)]

    def _drop_grammars(self, schedule: Schedule, error: BaseException) -> list[RequestOutput]:
        """The grammars' library panicked and does not say at which: end all requests in this step that have one."""
        guilty = {
            sequence.request_id: None
            for chunk in schedule.chunks
            for sequence in (chunk.sequence, *chunk.forks)
            if self._choice(sequence).grammar is not None
        }
        if not guilty:
            raise error
        self._undo(schedule)
        return [self._fail(request_id, reply_fault(request_id, error)) for request_id in guilty]

    def _undo(self, schedule: Schedule) -> None:
        self._scheduler.rollback(schedule)
        for chunk in schedule.chunks:
            self._runner.forget(chunk.sequence)

    def _count_prompt_tokens(self, schedule: Schedule) -> None:
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            running = self._requests.get(sequence.request_id)
            if running is not None and not sequence.position:
                computed = min(chunk.start + chunk.count, len(sequence.prompt_token_ids))
                running.prompt_tokens = max(running.prompt_tokens, computed)
            if chunk.samples and sequence.position == 0 and sequence.choice_index == 0:
                self._prompt_tokens += len(sequence.prompt_token_ids)
                self._cached_tokens += sequence.num_cached


def reply_fault(request_id: str, error: BaseException) -> VerbatimError:
    """What a request ends with because of an error; logs what nobody expected."""
    if isinstance(error, VerbatimError):
        return error
    log.error("%s: a fault in reading its reply", request_id, exc_info=error)
    return ReplyFault(f"this reply could not be read: {type(error).__name__}; the log has the details.")


def _may_speculate(model: LoadedModel) -> bool:
    """Whether guesses are asked for, and change nothing: where bits depend on the rows of a step they would."""
    if model.config.speculation == "off":
        return False
    if model.scheduler.whole_prompts or not model.info.law.holds:
        log.warning("%s: no speculation: replies would depend on it here (%s)", model.info.id, model.info.law.reason)
        return False
    return True


def _drawers(chunk: Chunk) -> list[Sequence]:
    """The sequences that draw a token from a chunk's last row; a fork that was preempted again draws later.

    Asked once a step, before anything changes their state. Empty, and no logits row, for a chunk that does not sample.
    """
    if not chunk.samples:
        return []
    if not chunk.forks:
        return [chunk.sequence]
    return [s for s in (chunk.sequence, *chunk.forks) if s.state is SequenceState.RUNNING]


def _marks(vocabulary: Vocabulary, chat_format: ChatFormat, *, calls: bool) -> dict[int, str]:
    """The special tokens that a chat_format is written with: they add nothing to a text, but have to be seen."""
    names = {i: vocabulary.token_text(i) for i in vocabulary.special_ids}
    return {i: name for i, name in names.items() if name and chat_format.mentions(name, calls=calls)}


def _together(a: TextDelta, b: TextDelta) -> TextDelta:
    return TextDelta(a.text + b.text, b.stopped, a.bytes + b.bytes, a.reasoning + b.reasoning, a.calls + b.calls)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

"""`EngineCore`: requests in, tokens out, one step at a time. Synchronous: no thread, no clock, no I/O.

A step is schedule, forward, sample, commit, return. What goes wrong in it ends one request, not the engine: a step that
does not fit in memory ends its largest request and recomputes the others; keys that are not finite end theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.detokenizer import TextStream, Vocabulary
from engine.errors import NumericalFault, OutOfMemory, VerbatimError
from engine.grammar import GrammarCompiler, GrammarState, unenforced_errors
from engine.loader import LoadedModel
from engine.model_runner import ForwardResult
from engine.sampler import Sampled, Sampler
from engine.scheduler import Chunk, Schedule
from engine.sequence import Sequence, SequenceState
from engine.stop_strings import StopStrings
from engine.types import (
    ChoiceDelta,
    EngineStats,
    FinishReason,
    PreparedRequest,
    RequestOutput,
    TokenLogprob,
    TopLogprob,
    Usage,
)


@dataclass(slots=True)
class _Running:
    """One request in the engine. Owns its sequences and their text."""

    request: PreparedRequest
    sequences: list[Sequence]
    texts: list[TextStream]
    grammars: list[GrammarState | None]
    unfinished: int
    completion_tokens: int = 0
    written: dict[int, list[str]] = field(default_factory=dict)
    """By choice, the texts so far, where they are to be checked against a schema in the end."""

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=self.completion_tokens,
            cached_tokens=self.sequences[0].num_cached,
        )


class EngineCore:
    """Continuous batching over one model. Not safe to call from two threads."""

    def __init__(self, model: LoadedModel) -> None:
        self._scheduler = model.scheduler
        self._runner = model.runner
        self._vocabulary: Vocabulary = model.vocabulary
        self._grammars: GrammarCompiler = model.grammars
        self._end_ids = frozenset(model.end_ids)
        self._sampler = Sampler(
            model.info.vocab_size,
            model.vocabulary.invalid_ids(model.info.vocab_size),
            model.end_ids,
            model.device,
        )
        self._requests: dict[str, _Running] = {}
        self._steps = 0
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
        sequences = [
            Sequence(request.request_id, i, request.prompt_token_ids, params, params.seed) for i in range(params.n)
        ]
        stops = StopStrings(params.stop)
        texts = [TextStream(self._vocabulary, stops) for _ in sequences]
        grammars = [self._grammars.start(request.grammar) if request.grammar else None for _ in sequences]
        self._requests[request.request_id] = _Running(request, sequences, texts, grammars, len(sequences))
        self._scheduler.add(sequences)

    def abort(self, request_id: str) -> None:
        """Forget a request, wherever it is; its blocks are free at once. Does nothing if it is gone."""
        running = self._requests.pop(request_id, None)
        if running is not None:
            for sequence in running.sequences:
                self._leave(sequence)

    def step(self) -> list[RequestOutput]:
        """Compute one step; one output for each request that it advanced or ended."""
        schedule = self._scheduler.schedule()
        drawers = [_drawers(chunk) for chunk in schedule.chunks]
        try:
            result = self._forward(schedule)
            sampled = self._sample(drawers, result)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return self._drop_largest(schedule, error)
        return self._commit(schedule, drawers, result, sampled)

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
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free,
        )

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _forward(self, schedule: Schedule) -> ForwardResult:
        if not schedule.chunks:
            return ForwardResult(torch.empty(0, self._runner.vocab_size), ())
        return self._runner.forward(schedule)

    def _sample(self, drawers: list[list[Sequence]], result: ForwardResult) -> list[Sampled | VerbatimError]:
        """One draw for each sequence of each chunk that samples; the choices of a prompt draw from one row."""
        groups = [group for group in drawers if group]
        rows = [sequence for group in groups for sequence in group]
        owners = [i for i, group in enumerate(groups) for _ in group]
        if not rows:
            return []
        return self._sampler.sample(result.logits, rows, owners, self._allowed(rows))

    def _grammar(self, sequence: Sequence) -> GrammarState | None:
        return self._requests[sequence.request_id].grammars[sequence.choice_index]

    def _allowed(self, rows: list[Sequence]) -> Tensor | None:
        """The grammars' masks, bool `[rows, vocab_size]`; None if none of the rows has a grammar.

        Computed after the forward pass was started: on a GPU, while it runs.
        """
        states = [self._grammar(sequence) for sequence in rows]
        if not any(states):
            return None
        return torch.from_numpy(self._grammars.masks(states)).to(self._sampler.device)

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
        drawn: list[tuple[Sequence, Sampled]] = []
        for chunk, group, finite in zip(schedule.chunks, drawers, result.finite, strict=True):
            if not finite:
                faults[chunk.sequence.request_id] = NumericalFault(
                    "the model computed keys or values that are not finite; its weights may be damaged."
                )
            for sequence in group:
                draw = next(draws)
                if isinstance(draw, VerbatimError):
                    faults.setdefault(sequence.request_id, draw)
                else:
                    drawn.append((sequence, draw))
        outputs = [self._fail(request_id, error) for request_id, error in faults.items()]
        self._count_prompt_tokens(schedule)
        self._scheduler.commit(schedule)
        deltas: dict[str, list[ChoiceDelta]] = {}
        for sequence, draw in drawn:
            request_id = sequence.request_id
            if request_id in faults:
                continue
            try:
                deltas.setdefault(request_id, []).append(self._advance(sequence, draw))
            except VerbatimError as error:  # its grammar cannot go on
                faults[request_id] = error
                deltas.pop(request_id, None)
                outputs.append(self._fail(request_id, error))
        return outputs + [self._output(request_id, parts) for request_id, parts in deltas.items()]

    def _advance(self, sequence: Sequence, draw: Sampled) -> ChoiceDelta:
        """Append a token to a choice, and those that its grammar forces after it; say what they add to the answer."""
        running = self._requests[sequence.request_id]
        params, text = sequence.params, running.texts[sequence.choice_index]
        grammar = running.grammars[sequence.choice_index]
        if grammar:
            grammar.check()
        logprobs = (self._logprob(draw, text),) if params.logprobs else None
        tokens = [draw.token_id]
        added, finish = self._append(sequence, draw.token_id)
        # Log-probabilities need a forward pass: with them a forced token is drawn, with no other to choose from.
        while finish is None and grammar and grammar.forced is not None and not params.logprobs:
            tokens.append(grammar.forced)
            more, finish = self._append(sequence, grammar.forced)
            added += more
        schema_error = None
        if finish:
            rest, stopped, _ = text.finish()
            added += rest
            self._leave(sequence)
            running.unfinished -= 1
            finish = "stop" if stopped else finish  # half a character, cut, may still complete a stop string
        if running.request.unenforced_schema is not None:
            written = running.written.setdefault(sequence.choice_index, [])
            written.append(added)
            if finish:
                schema_error = unenforced_errors("".join(written), running.request.unenforced_schema) or ""
        return ChoiceDelta(sequence.choice_index, added, tuple(tokens), logprobs, finish, schema_error)

    def _append(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
        """Append one token to a choice: the text that it shows, and whether the choice ends with it."""
        running = self._requests[sequence.request_id]
        params, text = sequence.params, running.texts[sequence.choice_index]
        grammar = running.grammars[sequence.choice_index]
        sequence.append(token)
        running.completion_tokens += 1
        self._generated_tokens += 1
        if token in params.stop_token_ids or (token in self._end_ids and not params.ignore_eos):
            return "", "stop"  # the token adds no text
        added, stopped, _ = text.push(token, sequence.position > params.min_tokens)
        if grammar is not None and not stopped:
            grammar.consume(token)
            stopped = grammar.stopped  # nothing but the end could follow, so nothing is drawn for it
        return added, "stop" if stopped else "length" if sequence.position == params.max_tokens else None

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
        for sequence in running.sequences:
            self._leave(sequence, reusable=False)
        return RequestOutput(request_id, (), running.usage(), True, error)

    def _drop_largest(self, schedule: Schedule, error: BaseException) -> list[RequestOutput]:
        """A step did not fit in memory: end the request that asked for most of it, recompute the others."""
        self._scheduler.rollback(schedule)
        for chunk in schedule.chunks:
            self._runner.forget(chunk.sequence)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        largest = max(schedule.chunks, key=lambda c: (c.count, c.start))
        reason = OutOfMemory(
            f"memory ran out in a step that computed {largest.count} tokens of this request at position "
            f"{largest.start}; a lower max_batch_tokens or context_length needs less. ({_first_line(error)})"
        )
        return [self._fail(largest.sequence.request_id, reason)]

    def _count_prompt_tokens(self, schedule: Schedule) -> None:
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if chunk.samples and sequence.position == 0 and sequence.choice_index == 0:
                self._prompt_tokens += len(sequence.prompt_token_ids)
                self._cached_tokens += sequence.num_cached


def _drawers(chunk: Chunk) -> list[Sequence]:
    """The sequences that draw a token from a chunk's last row; a fork that was preempted again draws later.

    Asked once a step, before anything changes their state. Empty, and no logits row, for a chunk that does not sample.
    """
    if not chunk.samples:
        return []
    if not chunk.forks:
        return [chunk.sequence]
    return [s for s in (chunk.sequence, *chunk.forks) if s.state is SequenceState.RUNNING]


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

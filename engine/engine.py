"""`Engine`: one loaded model that its caller steps. Synchronous: no thread of its own, no clock, no I/O.

    prepare ──▶ add ──▶ step, step, step … ──▶ outputs            abort: from anywhere, at once

A step is schedule, forward, sample, commit. A fault in it ends one request, not the engine: a step that does not fit in
memory ends its largest request and recomputes the others; keys that are not finite end theirs. `LLM` and `AsyncEngine`
are two ways to drive it.

A draft's positions are drawn together where nothing but the model decides what comes. Where a grammar or a budget of
thoughts has a say, each is drawn once the one before it was taken: what may come next is then never guessed.
"""

from __future__ import annotations

import logging
from itertools import groupby, takewhile

import numpy as np
import torch
from numpy.typing import NDArray

from engine.choice import Choice, SpecialIds
from engine.compute.model_runner import ForwardResult
from engine.errors import NumericalFault, OutOfMemory, VerbatimError, first_line, out_of_memory, panicked
from engine.faults import Drawn, reply_fault, step_faults
from engine.grammar.compiler import GrammarState
from engine.grammar.mask_worker import MaskWorker
from engine.model import LoadedModel
from engine.preparation import Preparer
from engine.replies.reply_stream import TextStream
from engine.running import PromptLogprobs, RunningRequest
from engine.sampling.sampler import Described, Sampler
from engine.scheduling.ahead import foresee
from engine.scheduling.drafts import Drafter, Places, Prediction, places_of
from engine.scheduling.row_limit import RowLimit
from engine.scheduling.schedule import Draw, Schedule
from engine.scheduling.sequence import Sequence, SequenceState
from engine.text.stop_strings import StopStrings
from engine.types.model_info import EngineStats, ModelInfo
from engine.types.outputs import ChoiceDelta, RequestOutput, Usage
from engine.types.requests import GenerationRequest, PreparedRequest

__all__ = ["Engine"]

log = logging.getLogger("verbatim.engine")


class Engine:
    """Continuous batching over one model.

    `prepare` may be called from any thread; everything else from one at a time.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.preparer = Preparer(model)
        self._scheduler = model.scheduler
        self._runner = model.runner
        self._masks = MaskWorker(model.grammars)
        self._ids = SpecialIds(frozenset(model.end_ids), model.closing_ids)
        # Special tokens that a chat format is written with add no text, but its parser has to see them.
        self._delimiters = {calls: _delimiters(model, calls=calls) for calls in (False, True)}
        self._stream = model.stream
        size = model.info.vocab_size
        with self._stream.current():
            self._sampler = Sampler(size, model.vocabulary.invalid_ids(size), model.end_ids, model.stream.device)
        self.drafts = not model.scheduler.whole_prompts and model.info.law.holds
        """Whether draft tokens are computed at all: where bits depend on the rows of a step they would change some."""
        self.speculates = _may_speculate(model, drafts=self.drafts)
        """Whether sequences that are added propose draft tokens of their own."""
        self._requests: dict[str, RunningRequest] = {}
        self._row_limit = RowLimit(model.scheduler)
        self._shortages = 0  # steps in a row that did not fit
        self._steps = 0
        self._drafted_tokens = 0
        self._accepted_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Check a request, render its template, tokenise it, fill in what it left open.

        Raises: as `Preparer.prepare`. InvalidParameter: the beginning of the reply that it gives cannot be that of one.
        """
        prepared = self.preparer.prepare(request)
        if prepared.begun:  # read once here, so that nothing is left to refuse
            self._choice(prepared, 0, StopStrings(prepared.params.stop), places_of(()))
        return prepared

    def add(self, request: PreparedRequest) -> None:
        """Queue a request. Its id must not be in use.

        Raises:
            ValueError: the id is in use, there is no such adapter, or a reply to be checked is none of this model's.
            Exception: whatever its grammar raises if it does not start; then nothing is queued.
        """
        if request.request_id in self._requests:
            raise ValueError(f"the request id {request.request_id!r} is in use")
        self._check_adapter(request)
        self._check_followed(request)
        stops = StopStrings(request.params.stop)
        places = places_of(request.prediction)
        choices = [self._choice(request, index, stops, places) for index in range(request.params.n)]
        scored = request.params.prompt_logprobs is not None
        logprobs = PromptLogprobs(self.model.vocabulary, request.prompt_token_ids) if scored else None
        self._requests[request.request_id] = RunningRequest(request, choices, len(choices), logprobs)
        self._scheduler.add([choice.sequence for choice in choices])

    def _check_adapter(self, request: PreparedRequest) -> None:
        if request.adapter and request.adapter not in self.info.adapters:
            raise ValueError(f"{self.info.id} has no adapter {request.adapter!r}")
        if request.adapter and request.adapter not in request.cache_share:
            raise ValueError("the request's share of the prefix cache is not its adapter's")

    def _check_followed(self, request: PreparedRequest) -> None:
        follow, params = request.follow, request.params
        if follow is not None:
            least = 0 if params.max_tokens == 0 else 1
            fits = len(follow) == params.n and all(least <= len(one) <= (params.max_tokens or 0) for one in follow)
            if not fits or any(not 0 <= token < self._runner.vocab_size for one in follow for token in one):
                raise ValueError("the reply to be checked has other choices, lengths or tokens than the request allows")

    def _choice(self, request: PreparedRequest, index: int, stops: StopStrings, places: Places) -> Choice:
        model, params = self.model, request.params
        assert params.seed is not None
        sequence = Sequence(
            request.request_id,
            index,
            request.prompt_token_ids,
            params,
            params.seed,
            group=request.group,
            share=request.cache_share,
            follow=request.follow[index] if request.follow is not None else None,
            records=request.record,
            begun=request.begun,
            adapter=request.adapter,
            next_scored=1 if params.prompt_logprobs is not None and index == 0 else -1,
        )
        parser = model.chat_format.parser(request.reply_format)
        reply = request.reply_format
        delimiters, held = self._delimiters[bool(reply.tools)], request.grammar is not None
        text = TextStream(model.vocabulary, stops, parser, delimiters, reply.previous, alike=held)
        grammar = model.grammars.start(request.grammar, request.grammar_param) if request.grammar else None
        choice = Choice(sequence, request.reply_format, text, grammar, model.vocabulary, self._ids)
        if self.speculates:
            choice.drafter = Drafter()
        if request.prediction:
            choice.prediction = Prediction(request.prediction, places)
        if request.begun:
            choice.begin(request.begun_param)
        return choice

    def abort(self, request_id: str) -> Usage | None:
        """Forget a request, running or waiting. Its blocks are free at once.

        Returns what it has used; None if it is gone already.
        """
        running = self._requests.pop(request_id, None)
        if running is None:
            return None
        for choice in running.choices:
            self._leave(choice.sequence)
        return running.usage()

    def queued(self) -> list[str]:
        """List the requests of which nothing has been computed yet."""
        return [
            request_id
            for request_id, running in self._requests.items()
            if running.choices[0].sequence.state is SequenceState.WAITING and not running.choices[0].sequence.generated
        ]

    def refuse(self, request_id: str, error: VerbatimError) -> RequestOutput:
        """End a request with an error."""
        running = self._requests.pop(request_id)
        for choice in running.choices:
            self._leave(choice.sequence, reusable=False)
        return RequestOutput(request_id, (), running.usage(), True, error)

    def step(self) -> list[RequestOutput]:
        """Compute one step, in any thread. Returns one output for each request that it advanced or ended."""
        with self._stream.current():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        held = self._held()
        schedule = self._scheduler.schedule(held, self._propose)
        if held and not schedule.chunks:
            self._masks.rest(held.values())
        first = [draw for draw in schedule.draws if not draw.index or self._choice_of(draw.sequence).stays_free]
        try:
            result = self._forward(schedule)
            sampled = self._sample(first, result, ahead=True)
            described = self._describe_prompts(schedule, result)
        except BaseException as error:
            if panicked(error):
                return self._drop_grammars(schedule, error)
            if not out_of_memory(error):
                raise
            return self._drop_largest(schedule, error)
        return self._commit(schedule, result, list(zip(first, sampled, strict=True)), described)

    def close(self) -> None:
        """Stop computing masks beside the steps, and end the process in which grammars are tried."""
        self._masks.close()
        self.preparer.close()

    def stats(self) -> EngineStats:
        """Return a snapshot of what runs and of what was computed so far."""
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

    def _choice_of(self, sequence: Sequence) -> Choice:
        return self._requests[sequence.request_id].choices[sequence.choice_index]

    def _may_draft(self, sequence: Sequence) -> bool:
        return self._choice_of(sequence).may_draft

    def _propose(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        return self._choice_of(sequence).draft(room) if self.drafts else ()

    def _held(self) -> dict[Sequence, GrammarState]:
        """Return the sequences that this step leaves out because their masks are being computed.

        Preempted ones wait in front of the queue, behind choices whose prompt another choice has computed.
        """
        preempted = takewhile(lambda sequence: sequence.generated or sequence.choice_index, self._scheduler.waiting)
        return {
            sequence: grammar
            for sequence in (*self._scheduler.running, *preempted)
            if (grammar := self._choice_of(sequence).grammar) is not None and self._masks.waits(grammar)
        }

    def _forward(self, schedule: Schedule) -> ForwardResult:
        if not schedule.chunks:
            return ForwardResult(torch.empty(0, self._runner.vocab_size, dtype=torch.float32), tuple)
        return self._runner.forward(schedule)

    def _sample(self, draws: list[Draw], result: ForwardResult, *, ahead: bool = False) -> list[Drawn]:
        """Draw tokens. `ahead`: the next step may be launched before they are known."""
        if not draws:
            return []
        drawing = self._sampler.start(result.logits, draws, [draw.row for draw in draws], self._allowed(draws))
        lookahead = self._runner.lookahead
        going = foresee(draws, self._scheduler, self._may_draft) if ahead and lookahead is not None else []
        if lookahead is not None and going:
            tokens = drawing.device_tokens()
            lookahead.launch([draws[n].sequence for n in going], [tokens[n : n + 1] for n in going])
        drawn = drawing.finish()
        if lookahead is not None and going:
            lookahead.confirm([drawing.device_told[n] for n in going])
        return drawn

    def _describe_prompts(self, schedule: Schedule, result: ForwardResult) -> list[Described | NumericalFault]:
        scores = schedule.scores
        if not scores:
            return []
        tokens = [score.sequence.prompt_token_ids[score.position] for score in scores]
        tops = [score.sequence.params.prompt_logprobs or 0 for score in scores]
        return self._sampler.describe(result.logits, [score.row for score in scores], tokens, tops)

    def _allowed(self, draws: list[Draw]) -> NDArray[np.int32] | None:
        """Return which tokens grammars and forced tokens allow, as masks of bits; None if all are allowed.

        Computed after the forward pass was started: on a GPU, while it runs.
        """
        choices = [self._choice_of(draw.sequence) for draw in draws]
        if all(choice.is_free for choice in choices):
            return None
        return self._masks.masks([c.grammar for c in choices], [c.forced for c in choices])

    def _commit(
        self,
        schedule: Schedule,
        result: ForwardResult,
        drawn: list[tuple[Draw, Drawn]],
        described: list[Described | NumericalFault],
    ) -> list[RequestOutput]:
        """Register what was computed, append what was drawn, return the outputs. A fault ends its own request."""
        self._steps += 1
        self._shortages = 0
        self._row_limit.settle(fits=True)
        faults = step_faults(schedule, result, drawn, described)
        outputs = [self.refuse(request_id, error) for request_id, error in faults.items()]
        self._count_prompt_tokens(schedule)
        self._scheduler.commit(schedule)
        self._keep_prompt_logprobs(schedule, described)
        deltas: dict[str, list[ChoiceDelta]] = {request_id: [] for request_id in self._end_prompts(schedule)}
        wave = drawn
        while wave:
            waiting: list[Draw] = []
            for sequence, pairs in groupby(wave, lambda pair: pair[0].sequence):
                request_id = sequence.request_id
                if request_id in faults or request_id not in self._requests:
                    continue
                try:
                    found, later = self._advance(self._choice_of(sequence), list(pairs))
                    deltas.setdefault(request_id, []).extend(found)
                    waiting += later
                except BaseException as error:  # its grammar cannot go on; other faults stay this request's, too
                    if not isinstance(error, Exception) and not panicked(error):
                        raise
                    faults[request_id] = fault = reply_fault(request_id, error)
                    outputs += self._ended_by(fault, request_id, deltas)
            wave = self._draw_on(waiting, result, outputs, deltas)
        self._learn(schedule)
        self._scheduler.settle_drafts(schedule)
        return outputs + [self._output(request_id, parts) for request_id, parts in deltas.items()]

    def _draw_on(
        self,
        draws: list[Draw],
        result: ForwardResult,
        outputs: list[RequestOutput],
        deltas: dict[str, list[ChoiceDelta]],
    ) -> list[tuple[Draw, Drawn]]:
        """Draw the next positions of drafts whose earlier ones were right."""
        draws = [draw for draw in draws if draw.sequence.request_id in self._requests]
        try:
            return list(zip(draws, self._sample(draws, result), strict=True))
        except BaseException as error:
            if panicked(error):  # the library does not say at which grammar
                held = [draw.sequence for draw in draws if self._choice_of(draw.sequence).grammar is not None]
                if not held:
                    raise
                for request_id in dict.fromkeys(sequence.request_id for sequence in held):
                    outputs += self._ended_by(reply_fault(request_id, error), request_id, deltas)
            elif out_of_memory(error):
                self._runner.release_memory()
            else:
                raise
            return []  # what was taken stays; the rest is drawn in the next steps

    def _ended_by(
        self, fault: VerbatimError, request_id: str, deltas: dict[str, list[ChoiceDelta]]
    ) -> list[RequestOutput]:
        """End a request with an error, after what this step has added to it."""
        before = deltas.pop(request_id, None)
        told = [self._requests[request_id].output(before)] if before else []
        return [*told, self.refuse(request_id, fault)]

    def _advance(self, choice: Choice, drawn: list[tuple[Draw, Drawn]]) -> tuple[list[ChoiceDelta], list[Draw]]:
        """Append the drawn tokens as long as they equal the draft, and the first one that does not.

        Returns what they add, and the draw that may follow now if the draft was right so far.
        """
        sequence, start = choice.sequence, choice.sequence.generated
        draft = drawn[0][0].draft
        deltas: list[ChoiceDelta] = []
        right = 0
        try:
            for draw, found in drawn:
                if isinstance(found, VerbatimError):
                    if deltas:
                        break  # it is drawn again, first, once these are out
                    raise found
                deltas.append(choice.advance(found))
                taken = sequence.output_token_ids
                while right < len(draft) and start + right < len(taken) and draft[right] == taken[start + right]:
                    right += 1
                if deltas[-1].finish_reason or right <= draw.index:
                    break
        finally:
            self._generated_tokens += sequence.generated - start
        self._scheduler.accept(sequence, right)
        choice.accept(right)
        self._accepted_tokens += right
        if deltas[-1].finish_reason:
            self._leave(sequence)
            self._requests[sequence.request_id].unfinished -= 1
            return deltas, []
        grammar = choice.grammar
        if len(drawn) == 1 and right == sequence.generated - start and not (grammar is not None and grammar.slow):
            return deltas, [Draw(sequence, drawn[0][0].row + right, draft[right:])]
        if grammar is not None and choice.forced is None:
            self._masks.look_ahead(grammar)
        return deltas, []

    def _learn(self, schedule: Schedule) -> None:
        """Let the choices learn from what became of their drafts."""
        for chunk in schedule.chunks:
            self._drafted_tokens += len(chunk.draft)
            if chunk.draft and chunk.sequence.request_id in self._requests:
                self._choice_of(chunk.sequence).learn(len(chunk.draft))

    def _keep_prompt_logprobs(self, schedule: Schedule, described: list[Described | NumericalFault]) -> None:
        for score, found in zip(schedule.scores, described, strict=True):
            running = self._requests.get(score.sequence.request_id)
            if running is not None and running.prompt_logprobs is not None and isinstance(found, Described):
                running.prompt_logprobs.add(found)
                score.sequence.next_scored = score.position + 1

    def _end_prompts(self, schedule: Schedule) -> list[str]:
        """End the requests that wanted their prompt computed and nothing drawn. Returns which ones have an output."""
        ended = []
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            running = self._requests.get(sequence.request_id)
            if sequence.params.max_tokens == 0 and sequence.num_computed == len(sequence) and running is not None:
                for choice in running.choices:
                    self._leave(choice.sequence)
                running.unfinished = 0
                ended.append(sequence.request_id)
        return ended

    def _output(self, request_id: str, deltas: list[ChoiceDelta]) -> RequestOutput:
        output = self._requests[request_id].output(deltas)
        if output.finished:
            del self._requests[request_id]
        return output

    def _count_prompt_tokens(self, schedule: Schedule) -> None:
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            running = self._requests.get(sequence.request_id)
            if running is not None and not sequence.generated:
                computed = min(chunk.start + chunk.count, len(sequence.prompt_token_ids))
                running.prompt_tokens = max(running.prompt_tokens, computed)
            ends = chunk.start + chunk.count - len(chunk.draft) == len(sequence)
            if ends and sequence.generated == 0 and sequence.choice_index == 0:
                self._prompt_tokens += len(sequence.prompt_token_ids)
                self._cached_tokens += sequence.num_cached

    # -- ends ---------------------------------------------------------------------------------------------------

    def _leave(self, sequence: Sequence, *, reusable: bool = True) -> None:
        self._scheduler.finish(sequence, reusable=reusable)
        self._runner.forget(sequence)

    def _drop_largest(self, schedule: Schedule, error: BaseException) -> list[RequestOutput]:
        """End the largest request of a step that did not fit, if nothing else helps. The others are recomputed."""
        self._undo(schedule)
        self._shortages += 1
        if self._runner.release_memory(again=self._shortages > 1) or self._row_limit.try_without(schedule):
            return []
        self._row_limit.settle(fits=False)
        largest = max(schedule.chunks, key=lambda c: (c.count, c.start))
        reason = OutOfMemory(
            f"memory ran out in a step that computed {largest.count} tokens of this request at position "
            f"{largest.start}; a lower max_batch_tokens or context_length needs less. ({first_line(error)})"
        )
        return [self.refuse(largest.sequence.request_id, reason)]

    def _drop_grammars(self, schedule: Schedule, error: BaseException) -> list[RequestOutput]:
        """End all requests of a step that have a grammar: its library panicked and does not say at which."""
        guilty = {
            sequence.request_id: None
            for chunk in schedule.chunks
            for sequence in (chunk.sequence, *chunk.forks)
            if self._choice_of(sequence).grammar is not None
        }
        if not guilty:
            raise error
        self._undo(schedule)
        return [self.refuse(request_id, reply_fault(request_id, error)) for request_id in guilty]

    def _undo(self, schedule: Schedule) -> None:
        self._scheduler.rollback(schedule)
        for chunk in schedule.chunks:
            self._runner.forget(chunk.sequence)


def _may_speculate(model: LoadedModel, *, drafts: bool) -> bool:
    if model.config.speculation == "off":
        return False
    if not drafts:
        log.warning("%s: no speculation: replies would depend on it here (%s)", model.info.id, model.info.law.reason)
        return False
    return True


def _delimiters(model: LoadedModel, *, calls: bool) -> dict[int, str]:
    """Return the special tokens that a model's chat format is written with, by id."""
    names = {i: model.vocabulary.token_text(i) for i in model.vocabulary.special_ids}
    return {i: name for i, name in names.items() if name and model.chat_format.mentions(name, calls=calls)}

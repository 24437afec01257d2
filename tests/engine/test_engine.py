"""What ends a reply, what a step does when something goes wrong, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, Constraint, InvalidParameter, NumericalFault, OutOfMemory, ReplyFault, RequestOutput
from engine.grammar.compiler import GrammarCompiler, GrammarState
from engine.scheduling.schedule import Chunk

PROMPT = "every parameter is honoured"


@pytest.fixture
def llm(tiny: Callable[[str], Path]) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=256)


def _nothing_is_left(llm: LLM) -> None:
    scheduler = llm.engine.model.scheduler
    scheduler.check()
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert not llm.engine._requests


def _end_bias(llm: LLM, value: float) -> dict[int, float]:
    return dict.fromkeys(llm.engine.model.end_ids, value)


def test_length(llm: LLM) -> None:
    [answer] = llm.generate(PROMPT, max_tokens=5, ignore_eos=True, seed=1)
    assert (answer.finish_reason, len(answer.token_ids), answer.usage.completion_tokens) == ("length", 5, 5)
    _nothing_is_left(llm)


def test_the_end_token_stops_is_counted_and_adds_no_text(llm: LLM) -> None:
    [answer] = llm.generate(PROMPT, logit_bias=_end_bias(llm, 100), logprobs=True, seed=1)
    assert (answer.finish_reason, answer.text, answer.usage.completion_tokens) == ("stop", "", 1)
    [entry] = answer.logprobs or ()
    assert (entry.token, entry.bytes) == ("<|im_end|>", b"")


def test_ignore_eos_goes_on_and_min_tokens_holds_the_end_back(llm: LLM) -> None:
    bias = _end_bias(llm, 100)
    [answer] = llm.generate(PROMPT, logit_bias=bias, ignore_eos=True, max_tokens=4, seed=1)
    assert answer.finish_reason == "length"
    [answer] = llm.generate(PROMPT, logit_bias=bias, min_tokens=3, max_tokens=9, seed=1)
    assert (answer.finish_reason, len(answer.token_ids)) == ("stop", 4)
    assert not set(answer.token_ids[:3]) & set(llm.engine.model.end_ids)


def test_a_stop_token_id_stops_and_adds_no_text(llm: LLM) -> None:
    [free] = llm.generate(PROMPT, max_tokens=12, seed=5, ignore_eos=True)
    [stopped] = llm.generate(PROMPT, max_tokens=12, seed=5, ignore_eos=True, stop_token_ids=[free.token_ids[6]])
    cut = free.token_ids.index(free.token_ids[6]) + 1
    assert stopped.token_ids == free.token_ids[:cut]
    assert stopped.finish_reason == "stop"
    assert free.text.startswith(stopped.text)


def test_a_stop_string_across_tokens_is_cut_out_and_nothing_of_it_was_streamed(llm: LLM) -> None:
    [free] = llm.generate(PROMPT, max_tokens=40, seed=7, ignore_eos=True)
    stop = free.text[10:16]
    outputs = list(llm.stream(PROMPT, max_tokens=40, seed=7, ignore_eos=True, stop=[stop]))
    text = "".join(d.text for o in outputs for d in o.deltas)
    assert text == free.text[: free.text.index(stop)]
    assert (outputs[-1].deltas[0].finish_reason, outputs[-1].deltas[0].stop_string) == ("stop", stop)
    assert all(delta.stop_string is None for output in outputs[:-1] for delta in output.deltas)
    tokens = [t for o in outputs for d in o.deltas for t in d.token_ids]
    assert tuple(tokens) == free.token_ids[: len(tokens)]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_padding_rows_of_the_vocabulary_are_never_produced(llm: LLM, temperature: float) -> None:
    real = len(llm.engine.model.tokenizer)
    assert real < llm.info.vocab_size
    [answer] = llm.generate(
        PROMPT, max_tokens=200, temperature=temperature, seed=1, ignore_eos=True, logprobs=True, top_logprobs=20
    )
    assert max(answer.token_ids) < real
    assert max(t.token_id for e in answer.logprobs or () for t in e.top) < real


def test_the_bytes_of_all_entries_rebuild_the_text(llm: LLM) -> None:
    for seed in range(6):
        [answer] = llm.generate(PROMPT, max_tokens=60, seed=seed, logprobs=True)
        joined = b"".join(e.bytes for e in answer.logprobs or ())
        assert joined.decode(errors="replace") == answer.text
        assert answer.text == llm.engine.model.tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_a_model_that_computes_nan_fails_the_request_and_spares_the_neighbour(tiny: Callable[[str], Path]) -> None:
    """One token's embedding is damaged; requests that hold it fail, the others are answered as if it were not there."""
    llm = LLM(tiny("qwen3"), cache_size="32MiB", context_length=256)
    [clean] = llm.generate(PROMPT, max_tokens=6, seed=3)
    model = llm.engine.model.runner._model.model  # type: ignore[attr-defined]
    table = model.get_input_embeddings().weight.detach().clone()
    table[llm.engine.model.tokenizer("%")["input_ids"][0]] = float("nan")
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    with pytest.raises(NumericalFault):
        llm.generate("a prompt with % in the middle of it", max_tokens=3)
    bad = llm.add("again % here", max_tokens=4).request_id
    good = llm.add(PROMPT, max_tokens=6, seed=3).request_id
    outputs = list(llm.outputs(good))
    assert tuple(t for o in outputs for d in o.deltas for t in d.token_ids) == clean.token_ids
    with pytest.raises(NumericalFault):
        list(llm.outputs(bad))
    # Poisoned keys are not handed to a later prompt.
    [again] = llm.generate(PROMPT, max_tokens=6, seed=3)
    assert again.token_ids == clean.token_ids
    _nothing_is_left(llm)


def test_a_fault_in_reading_one_reply_spares_the_neighbour(
    tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A bug in what takes replies apart must not end everybody's."""
    llm = LLM(tiny("qwen3"), cache_size="32MiB", context_length=256)
    [clean] = llm.generate(PROMPT, max_tokens=6, seed=3)
    bad = llm.add("another prompt", max_tokens=4, n=2).request_id
    good = llm.add(PROMPT, max_tokens=6, seed=3).request_id
    for choice in llm.engine._requests[bad].choices:
        choice.text = None  # type: ignore[assignment]
    outputs = list(llm.outputs(good))
    assert tuple(t for o in outputs for d in o.deltas for t in d.token_ids) == clean.token_ids
    with pytest.raises(ReplyFault, match="AttributeError"):
        list(llm.outputs(bad))
    assert "Traceback" in caplog.text
    _nothing_is_left(llm)


class PanicException(BaseException):
    """As libraries in Rust raise it: no `Exception`."""


def test_a_panic_of_the_grammars_library_ends_those_who_have_one(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny("qwen3"), cache_size="32MiB", context_length=256)
    [clean] = llm.generate(PROMPT, max_tokens=6, seed=3)

    def panics(*_: object) -> None:
        raise PanicException("index out of bounds")

    for where in ("masks", "consume"):
        bad = llm.add("another prompt", constraint=Constraint("regex", "a*b"), max_tokens=4, n=2).request_id
        good = llm.add(PROMPT, max_tokens=6, seed=3).request_id
        monkeypatch.setattr(GrammarCompiler if where == "masks" else GrammarState, where, panics)
        outputs = list(llm.outputs(good))
        assert tuple(t for o in outputs for d in o.deltas for t in d.token_ids) == clean.token_ids
        with pytest.raises(ReplyFault, match="PanicException"):
            list(llm.outputs(bad))
        monkeypatch.undo()
    _nothing_is_left(llm)


def test_a_text_that_the_model_cannot_take_fails_that_request_and_spares_the_neighbour(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fallback runner, where a model runs as transformers wrote it: a table of positions may be too short."""
    llm = LLM(tiny("mamba"), context_length=256)
    [clean] = llm.generate(PROMPT, max_tokens=6, seed=3)
    bad = llm.add("another prompt", max_tokens=4).request_id
    good = llm.add(PROMPT, max_tokens=6, seed=3).request_id
    runner: Any = llm.engine.model.runner
    compute = runner._pass

    def fails(chunk: Chunk) -> torch.Tensor:
        if chunk.sequence.request_id == bad and chunk.start:
            raise RuntimeError("The size of tensor a (300) must match the size of tensor b (256)")
        return compute(chunk)  # type: ignore[no-any-return]

    monkeypatch.setattr(runner, "_pass", fails)
    outputs = list(llm.outputs(good))
    assert tuple(t for o in outputs for d in o.deltas for t in d.token_ids) == clean.token_ids
    with pytest.raises(ReplyFault, match="the model failed on this request: The size of tensor a"):
        list(llm.outputs(bad))
    _nothing_is_left(llm)


class _TooBig:
    """A runner that finds no memory for steps with many tokens."""

    lookahead = None

    def __init__(self, inner: Any, limit: int, error: Callable[[], BaseException]) -> None:
        self.inner, self.limit, self.error = inner, limit, error
        self.vocab_size = inner.vocab_size

    def forward(self, schedule: Any) -> Any:
        if sum(c.count for c in schedule.chunks) > self.limit:
            raise self.error()
        return self.inner.forward(schedule)

    def forget(self, sequence: Any) -> None:
        self.inner.forget(sequence)

    def release_memory(self, *, again: bool = False) -> bool:
        return bool(self.inner.release_memory(again=again))


ERRORS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    "python": lambda: MemoryError(),
}


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_ends_the_largest_request_and_the_others_are_answered_as_ever(
    error: str, tiny: Callable[[str], Path]
) -> None:
    llm = LLM(tiny("qwen3"), cache_size="32MiB", context_length=512)
    [clean] = llm.generate(PROMPT, max_tokens=9, seed=3)
    llm.engine.model.scheduler.pool.clear_cache()
    llm.engine._runner = _TooBig(llm.engine._runner, 100, ERRORS[error])
    small = llm.add(PROMPT, max_tokens=9, seed=3).request_id
    llm.engine.step()
    large = llm.add("x " * 200, max_tokens=9).request_id
    outputs = list(llm.outputs(small))
    with pytest.raises(OutOfMemory, match="max_batch_tokens"):
        list(llm.outputs(large))
    tokens = tuple(t for o in outputs for d in o.deltas for t in d.token_ids)
    assert clean.token_ids[-len(tokens) :] == tokens
    _nothing_is_left(llm)


class _Short:
    """A runner that finds no memory for a while, and gives back something each time that it is asked to."""

    lookahead = None

    def __init__(self, inner: Any, fails: int, helps: int) -> None:
        self.inner, self.fails, self.helps = inner, fails, helps
        self.vocab_size = inner.vocab_size
        self.asked: list[bool] = []

    def forward(self, schedule: Any) -> Any:
        if self.fails:
            self.fails -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner.forward(schedule)

    def forget(self, sequence: Any) -> None:
        self.inner.forget(sequence)

    def release_memory(self, *, again: bool = False) -> bool:
        self.asked.append(again)
        return len(self.asked) <= self.helps


@pytest.mark.parametrize(("fails", "helps"), [(1, 1), (2, 2), (3, 2)])
def test_a_shortage_that_passes_ends_no_request(llm: LLM, fails: int, helps: int) -> None:
    """Another model's memory comes free, or graphs are given up; only then does the largest request end."""
    [clean] = llm.generate(PROMPT, max_tokens=9, seed=3)
    runner = llm.engine._runner = _Short(llm.engine._runner, fails, helps)  # type: ignore[assignment]
    outputs: list[Any] = []
    try:
        outputs = list(llm.outputs(llm.add(PROMPT, max_tokens=9, seed=3).request_id))
    except OutOfMemory:
        assert fails > helps
    assert runner.asked == [False, True, True][:fails]
    if fails <= helps:
        assert tuple(t for o in outputs for d in o.deltas for t in d.token_ids) == clean.token_ids
    again = llm.generate(PROMPT, max_tokens=9, seed=3)
    assert again[0].token_ids == clean.token_ids
    _nothing_is_left(llm)


def test_another_error_is_not_mistaken_for_a_full_memory(llm: LLM) -> None:
    llm.engine._runner = _TooBig(llm.engine._runner, 0, lambda: RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        llm.generate(PROMPT, max_tokens=2)


def test_all_tokens_banned_fails_that_request_by_name(llm: LLM) -> None:
    everything = dict.fromkeys(range(len(llm.engine.model.tokenizer)), -100)
    with pytest.raises(InvalidParameter) as caught:
        llm.generate(PROMPT, logit_bias=everything, max_tokens=2)
    assert caught.value.code == "no_token_left"
    _nothing_is_left(llm)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_frees_everything_at_any_point(llm: LLM, steps: int) -> None:
    """Queued, in prefill (cut into chunks), while choices fork, while decoding."""
    llm.engine.model.scheduler.max_batch_tokens = 8
    request_id = llm.add("a longer prompt, cut into several chunks of eight", n=4, max_tokens=50).request_id
    for _ in range(steps):
        llm.engine.step()
    llm.engine.abort(request_id)
    llm.engine.abort(request_id)
    _nothing_is_left(llm)
    assert llm.engine.step() == []


def test_leaving_a_stream_early_frees_its_place(llm: LLM) -> None:
    for output in llm.stream(PROMPT, max_tokens=50, ignore_eos=True):
        assert isinstance(output, RequestOutput)
        break
    import gc

    gc.collect()
    _nothing_is_left(llm)


def test_usage_counts_all_choices_and_the_prompt_once(llm: LLM) -> None:
    answers = llm.generate(PROMPT, n=3, max_tokens=4, ignore_eos=True, seed=1)
    prompt = len(llm.engine.model.tokenizer(PROMPT)["input_ids"])
    for answer in answers:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)
        assert answer.usage.total_tokens == prompt + 12


@pytest.mark.parametrize("how", ["step", "abort"])
def test_outputs_that_somebody_else_has_are_not_waited_for(llm: LLM, how: str) -> None:
    """A script that steps the engine itself and then reads through `LLM` hears so, and does not wait for ever."""
    request_id = llm.add(PROMPT, max_tokens=3, seed=1).request_id
    if how == "abort":
        llm.engine.abort(request_id)
    while llm.engine.has_work:
        llm.engine.step()
    with pytest.raises(RuntimeError, match=f"{request_id} has ended in steps that were taken elsewhere"):
        list(llm.outputs(request_id))
    assert llm.generate(PROMPT, max_tokens=3, seed=1)[0].token_ids

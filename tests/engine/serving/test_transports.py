"""What holds of an engine wherever it runs: one table of laws for a thread and for a process of its own."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from async_requests import collect, in_group, request, run, until

from engine import (
    ChatMessage,
    ChoiceDelta,
    Constraint,
    ContextLengthExceeded,
    GenerationRequest,
    InvalidFormat,
    InvalidParameter,
    ModelConfig,
    QueueFull,
    RequestError,
    RequestOutput,
    Tool,
    ToolChoice,
    VerbatimError,
    open_engine,
)
from engine.serving.client import EngineClient


@pytest.fixture(scope="module")
def engines(tiny: Callable[[str], Path]) -> Iterator[dict[str, EngineClient]]:
    """The same entry on a thread and in a process."""
    entry = ModelConfig(
        id="tiny", path=tiny("qwen3"), cache_size="32MiB", context_length=512, max_sequences=4, max_queue=2
    )
    opened: dict[str, Any] = {}
    try:
        for kind in ("thread", "process"):
            opened[kind] = open_engine(ModelConfig(**{**entry.model_dump(), "isolation": kind}))
        yield opened
    finally:
        closed = [engine.close() for engine in opened.values()]
        assert all(closed)


@pytest.fixture(params=["thread", "process"])
def engine(request: pytest.FixtureRequest, engines: dict[str, EngineClient]) -> Iterator[EngineClient]:
    """An engine that others use, too: idle before and after."""
    engine = engines[request.param]
    yield engine
    run(until(lambda: not engine.is_stepping and not engine.stats().running + engine.stats().waiting))
    assert engine.stats().blocks_free == engine.stats().blocks_total
    assert engine.stats().alive


ASKED: dict[str, GenerationRequest] = {
    "sampled": request("r", seed=1, max_tokens=12),
    "greedy": request("r", seed=0, temperature=0, max_tokens=12),
    "log-probabilities": request("r", seed=2, max_tokens=6, logprobs=True, top_logprobs=5, margins=True),
    "several choices": request("r", seed=3, max_tokens=9, n=3, stop=["e"]),
    "a prompt's": GenerationRequest(
        request_id="r",
        prompt="héllo wörld " * 8,
        echo=True,
        sampling={"seed": 4, "max_tokens": 4, "prompt_logprobs": 3},
    ),
    "tokens": GenerationRequest(request_id="r", prompt_token_ids=(5, 9, 200), sampling={"seed": 5, "max_tokens": 20}),
    "recorded": replace(request("r", seed=6, max_tokens=9), record=True, clock=dt.datetime(2026, 1, 31)),
    "an expression": replace(request("r", seed=7, max_tokens=40), constraint=Constraint("regex", "[a-d]{5}-(x|yz)+!")),
    "a schema": replace(
        request("r", seed=8, max_tokens=60),
        constraint=Constraint("json", {"type": "object", "properties": {"é": {"type": "integer"}}, "required": ["é"]}),
    ),
    "a tool": replace(
        request("r", seed=9, max_tokens=90),
        tools=(Tool("look", "looks", {"type": "object", "properties": {"at": {"enum": ["a", "b"]}}}, strict=True),),
        tool_choice=ToolChoice("required"),
    ),
    "a guess": replace(request("r", seed=0, temperature=0, max_tokens=9), prediction="hello world, hello"),
    "nothing": request("r", seed=10, max_tokens=0),
}


@pytest.mark.parametrize("case", ASKED)
def test_a_process_says_what_a_thread_says(case: str, engines: dict[str, EngineClient]) -> None:
    """Everything that a request is told, to the bit: prepared, streamed, counted."""

    async def told(engine: EngineClient) -> list[Any]:
        prepared = await engine.prepare(ASKED[case])
        outputs = [output async for output in engine.submit(prepared)]
        assert outputs[-1].error is None
        deltas = [delta for output in outputs for delta in output.deltas]
        choices = [[d for d in deltas if d.index == index] for index in range(prepared.params.n)]
        scored = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        prompt = await engine.tokenize(ASKED[case]), await engine.detokenize(prepared.prompt_token_ids)
        usage = replace(outputs[-1].usage, cached_tokens=0)
        return [prepared, prompt, [joined(choice) for choice in choices], scored, usage]

    def joined(deltas: list[ChoiceDelta]) -> list[Any]:
        """All fields of a choice's deltas, wherever they were cut."""
        whole = [
            [part for d in deltas for part in (getattr(d, name) or ())]
            for name in ("text", "token_ids", "logprobs", "reasoning", "scores", "margins", "checks")
        ]
        calls = [(call.name, call.arguments) for d in deltas for call in d.tool_calls]
        ends = [(d.finish_reason, d.schema_error, d.stop_string) for d in deltas if d.finish_reason]
        return [*whole, calls, ends]

    thread, process = (run(told(engines[kind])) for kind in ("thread", "process"))
    assert repr(process) == repr(thread), "with repr, -0.0 is not 0.0"
    assert any(any(choice) for choice in thread[2])


def test_a_process_describes_what_a_thread_describes(engines: dict[str, EngineClient]) -> None:
    """Where a model runs is no part of its fingerprint, nor of anything else that is known of it."""
    thread, process = engines["thread"], engines["process"]
    assert pickle.dumps(process.info.fingerprint_parts) == pickle.dumps(thread.info.fingerprint_parts)
    assert process.info == thread.info
    assert run(process.tokenizer()) == run(thread.tokenizer())
    assert [process.token_text(i) for i in range(300)] == [thread.token_text(i) for i in range(300)]
    assert process.step_bytes == thread.step_bytes == {}


def test_every_error_of_the_engine_is_one_that_crosses() -> None:
    """Those of `engine.errors` do (test_frames.py); one that is defined elsewhere would end a model that sends it."""

    def kinds(parent: type) -> Iterator[type]:
        for kind in parent.__subclasses__():
            yield kind
            yield from kinds(kind)

    own = [kind for kind in kinds(VerbatimError) if kind.__module__.startswith("engine.")]
    assert {kind.__module__ for kind in own} == {"engine.errors"}


def test_counters_say_which_process_and_how_large(engines: dict[str, EngineClient]) -> None:
    thread, process = engines["thread"].stats(), engines["process"].stats()
    assert (thread.process_id, thread.resident_bytes) == (None, 0)
    assert process.process_id is not None
    assert psutil.Process(process.process_id).ppid() == os.getpid()
    assert process.resident_bytes > 100 << 20, "torch alone is larger"


def test_many_at_once_get_what_each_gets_alone(engine: EngineClient) -> None:
    async def main() -> None:
        wanted = [request(f"r{i}", seed=i, max_tokens=10 + i) for i in range(4)]
        alone = [await collect(engine, w) for w in wanted]
        together = await asyncio.gather(*(collect(engine, w) for w in wanted))

        def tokens(outputs: list[RequestOutput]) -> list[int]:
            return [t for o in outputs for d in o.deltas for t in d.token_ids]

        assert [tokens(o) for o in together] == [tokens(o) for o in alone]
        assert all(o[-1].finished and not any(x.finished for x in o[:-1]) for o in together)

    run(main())


def test_the_loop_is_woken_once_a_step(engine: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        real, calls = loop.call_soon_threadsafe, []

        def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name.startswith("engine-"):
                calls.append(function)
            return real(function, *args, **kwargs)

        wanted = [await engine.prepare(request(f"r{i}", seed=i, max_tokens=20, ignore_eos=True)) for i in range(4)]
        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        before = engine.stats().steps

        async def read(prepared: Any) -> None:
            async for _ in engine.submit(prepared):
                pass

        await asyncio.gather(*(read(w) for w in wanted))
        assert 0 < len(calls) <= engine.stats().steps - before

    run(main())


def test_abort_frees_the_place_within_a_step_and_ends_the_stream(engine: EngineClient) -> None:
    async def main() -> None:
        stream = engine.submit(await engine.prepare(request("gone", max_tokens=400, ignore_eos=True)))
        await anext(stream)
        steps = engine.stats().steps
        engine.abort("gone")
        engine.abort("gone")
        engine.abort("never there")
        await until(lambda: engine.stats().running == 0)
        within = 2 if engine.stats().process_id is None else 50  # a pipe takes its time
        assert engine.stats().steps <= steps + within
        assert engine.stats().blocks_free == engine.stats().blocks_total
        rest = [o async for o in stream]  # ends, whatever had been on its way
        assert not any(o.finished for o in rest)

    run(main())


def test_an_id_that_comes_again_hears_nothing_of_the_one_before(engine: EngineClient) -> None:
    """What the step under way still computes for an aborted request is no part of the next one of that id."""

    def wanted(seed: int) -> GenerationRequest:
        return request("again", seed=seed, max_tokens=6, ignore_eos=True)

    async def main() -> None:
        alone = [await collect(engine, wanted(seed)) for seed in range(20)]
        for seed in range(20):
            for count in range(3):  # given up after a few outputs
                given_up = engine.submit(await engine.prepare(wanted(99)))
                for _ in range(count):
                    await anext(given_up)
                engine.abort("again")
            prepared = await engine.prepare(wanted(seed))
            stream = engine.submit(prepared)
            assert engine.num_unfinished == 1
            with pytest.raises(ValueError, match="'again' is in use"):
                engine.submit(prepared)
            outputs = [output async for output in stream]
            assert [o.deltas for o in outputs] == [o.deltas for o in alone[seed]]
            assert outputs[-1].usage.completion_tokens == 6
            await given_up.let_go()
            assert (engine.num_unfinished, engine.num_leaving) == (0, 0)

    run(main())


def test_what_another_event_loop_left_is_aborted(engine: EngineClient) -> None:
    async def left() -> None:
        for i in range(4):
            await anext(engine.submit(await engine.prepare(request(f"r{i}", max_tokens=400, ignore_eos=True))))

    async def refused() -> None:
        with pytest.raises(RuntimeError, match="belong to another event loop, which is not closed"):
            engine.submit(await engine.prepare(request("elsewhere")))

    async def main() -> None:
        again = await collect(engine, request("r0", seed=1, max_tokens=6, ignore_eos=True))
        assert again[-1].usage.completion_tokens == 6
        assert len([t for o in again for d in o.deltas for t in d.token_ids]) == 6
        await until(lambda: engine.stats().running == 0)
        await asyncio.to_thread(asyncio.run, refused())

    run(left())
    run(main())


@pytest.mark.slow
def test_a_full_queue_refuses_and_a_free_place_accepts(engine: EngineClient) -> None:
    async def main() -> None:
        for i in range(6):
            engine.submit(await engine.prepare(request(f"r{i}", max_tokens=400, ignore_eos=True)))
        late = await engine.prepare(request("late"))
        with pytest.raises(QueueFull, match="6 requests are running or waiting; tiny takes 6"):
            engine.submit(late)
        engine.abort("r3")
        assert [o async for o in engine.submit(late)][-1].finished

    run(main())


@pytest.mark.slow
def test_a_full_queue_has_room_for_one_of_somebody_else(engine: EngineClient) -> None:
    async def main() -> None:
        for i in range(6):
            engine.submit(await engine.prepare(in_group(f"r{i}", "a", max_tokens=100, ignore_eos=True)))
        with pytest.raises(QueueFull):
            engine.submit(await engine.prepare(in_group("late", "a")))
        other = engine.submit(await engine.prepare(in_group("other", "b", max_tokens=3)))
        with pytest.raises(QueueFull):
            engine.submit(await engine.prepare(in_group("another", "b")))
        assert [o async for o in other][-1].finished
        assert engine.stats().waiting + engine.stats().running > 0, "the other's were not all served before"

    run(main())


REFUSED: dict[str, tuple[GenerationRequest, type[Exception], str | None]] = {
    "no message": (GenerationRequest(request_id="r", messages=()), InvalidParameter, "messages"),
    "nothing": (GenerationRequest(request_id="r"), InvalidFormat, None),
    "too long": (
        GenerationRequest(request_id="r", prompt="many words " * 300),
        ContextLengthExceeded,
        "prompt",
    ),
    "an id outside the vocabulary": (request("r", logit_bias={440: 1}), InvalidParameter, "logit_bias.440"),
    "a stop id outside": (request("r", stop_token_ids=[447]), InvalidParameter, "stop_token_ids"),
    "a prompt id outside": (
        GenerationRequest(request_id="r", prompt_token_ids=(446,)),
        InvalidParameter,
        "prompt_token_ids",
    ),
    "too many choices": (request("r", n=17), InvalidParameter, "n"),
    "unknown field": (request("r", heat=1), InvalidParameter, "heat"),
    "half a character": (GenerationRequest(request_id="r", prompt="a\ud800"), InvalidFormat, "prompt"),
    "unknown template variable": (
        GenerationRequest(request_id="r", messages=(ChatMessage("user", "x"),), chat_template_kwargs={"mood": "good"}),
        InvalidParameter,
        "chat_template_kwargs.mood",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_queued(case: str, engine: EngineClient) -> None:
    wanted, kind, param = REFUSED[case]
    with pytest.raises(kind) as caught:
        run(engine.prepare(wanted))
    assert isinstance(caught.value, RequestError)
    assert caught.value.param == param
    assert engine.stats().waiting == engine.stats().running == 0


def test_a_prompt_over_the_context_is_refused_with_both_numbers(engine: EngineClient) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        run(engine.prepare(GenerationRequest(request_id="r", prompt_token_ids=(5,) * 512)))
    assert caught.value.details == {"prompt_tokens": 512, "context_length": 512}
    prepared = run(
        engine.prepare(GenerationRequest(request_id="r", prompt_token_ids=(5,) * 511, sampling={"max_tokens": 9}))
    )
    assert prepared.params.max_tokens == 1, "clamped to what is left"


@pytest.mark.parametrize(("limit", "length"), [(16, 11), (6, 1), (1000, 400), (None, 400)])
def test_a_reply_is_clamped_to_the_callers_context(engine: EngineClient, limit: int | None, length: int) -> None:
    """A key's context counts prompt and reply, and never allows more than the model does."""
    sampling = {"max_tokens": 400, "min_tokens": 300}
    wanted = GenerationRequest(request_id="r", prompt_token_ids=(5,) * 5, sampling=sampling, context_limit=limit)
    params = run(engine.prepare(wanted)).params
    assert (params.max_tokens, params.min_tokens) == (length, min(length, 300))


@pytest.mark.parametrize(
    ("tokens", "limit", "whose"), [(5, 5, "this caller's"), (9, 5, "this caller's"), (512, 5, "this model's")]
)
def test_a_prompt_over_the_callers_context_is_refused(
    engine: EngineClient, tokens: int, limit: int, whose: str
) -> None:
    """Before it is queued, and with the limit that it exceeds."""
    wanted = GenerationRequest(request_id="r", prompt_token_ids=(5,) * tokens, context_limit=limit)
    with pytest.raises(ContextLengthExceeded, match=f"the prompt has {tokens} tokens; {whose} context holds") as caught:
        run(engine.prepare(wanted))
    assert caught.value.details == {"prompt_tokens": tokens, "context_length": 512 if tokens == 512 else limit}


def test_what_crosses_is_plain_data(engine: EngineClient) -> None:
    """A process boundary stays possible: every message and every error survives pickling."""

    async def main() -> None:
        wanted = request("r", max_tokens=4, logprobs=True, top_logprobs=2)
        prepared = await engine.prepare(wanted)
        outputs = [o async for o in engine.submit(prepared)]
        for thing in (wanted, prepared, outputs, engine.stats(), engine.info):
            assert pickle.loads(pickle.dumps(thing)) == thing

    run(main())
    error = ContextLengthExceeded("too long", param="messages", prompt_tokens=3, context_length=2)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.param, copy.code, copy.details) == (
        error.message,
        error.param,
        error.code,
        error.details,
    )

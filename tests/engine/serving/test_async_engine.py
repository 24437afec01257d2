"""The engine behind a thread: what reaches into it. Laws of every transport are in test_transports.py."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from async_requests import collect, in_group, request, run, until

from engine import (
    AsyncEngine,
    ChatMessage,
    Constraint,
    ContextLengthExceeded,
    Engine,
    EngineDead,
    GenerationRequest,
    InvalidParameter,
    ModelConfig,
    ModelLoading,
    ModelNotFound,
    QueueTimeout,
    Registry,
    ReplyFault,
    RequestOutput,
)
from engine.loading.loader import load
from engine.preparation import Preparer
from engine.prompts.prompt_encoder import PromptEncoder
from engine.serving.models.slot import Slot
from engine.serving.protocol import Ended


@pytest.fixture
def engine(tiny: Callable[[str], Path]) -> Iterator[AsyncEngine]:
    config = ModelConfig(
        id="tiny", path=tiny("qwen3"), cache_size="32MiB", context_length=512, max_sequences=4, max_queue=2
    )
    engine = AsyncEngine(Engine(load(config)))
    yield engine
    engine.close()


@pytest.mark.parametrize("shared", [False, True])
def test_the_prefix_cache_tells_no_group_of_anothers_prompts(tiny: Callable[[str], Path], shared: bool) -> None:
    """Whose request it is and its salt decide what is found; the reply has the same bits in every case."""
    entry = ModelConfig(
        id="tiny", path=tiny("qwen3"), cache_size="32MiB", context_length=512, share_prefix_cache=shared
    )
    engine = AsyncEngine(Engine(load(entry)))
    number = itertools.count()

    async def ask(group: str, salt: str) -> tuple[int, Any]:
        wanted = replace(
            request(f"r{next(number)}", seed=5, max_tokens=6, logprobs=True),
            messages=(ChatMessage("user", "what nobody else is to know " * 6),),
            group=group,
            cache_salt=salt,
        )
        outputs = await collect(engine, wanted)
        usage = outputs[-1].usage
        assert usage is not None
        return usage.cached_tokens, [delta for output in outputs for delta in output.deltas]

    async def main() -> None:
        asked = [("ada", ""), ("bob", ""), ("ada", ""), ("ada", "s"), ("bob", ""), ("ada", "s"), ("", ""), ("bob", "s")]
        found = [await ask(group, salt) for group, salt in asked]
        seen: set[tuple[str, str]] = set()
        for (group, salt), (cached, deltas) in zip(asked, found, strict=True):
            share = ("" if shared else group, salt)
            assert (cached > 0) == (share in seen), f"{group!r} with salt {salt!r} found {cached} tokens"
            seen.add(share)
            assert deltas == found[0][1], "the reply depends on what was found"

    try:
        run(main())
    finally:
        engine.close()


def test_a_request_waits_for_its_turn_as_long_as_it_may(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._transport.loop, "_queue_seconds", 0.1)

    async def main() -> None:
        running = [
            engine.submit(await engine.prepare(request(f"r{i}", max_tokens=450, ignore_eos=True))) for i in range(4)
        ]
        late = engine.submit(await engine.prepare(request("late", max_tokens=3)))
        [refusal] = [output async for output in late]
        assert isinstance(refusal.error, QueueTimeout)
        assert "0.1 seconds" in refusal.error.message
        for stream in running:
            assert [o async for o in stream][-1].error is None, "who runs is not ended"
        assert (await collect(engine, request("after", max_tokens=3)))[-1].finished

    run(main())


def test_a_dying_engine_tells_everybody_why(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        streams = [
            engine.submit(await engine.prepare(request(f"r{i}", max_tokens=400, ignore_eos=True))) for i in range(5)
        ]
        await anext(streams[0])

        def broken() -> None:
            raise RuntimeError("the card fell off the bus")

        monkeypatch.setattr(engine.engine, "step", broken)
        for stream in streams:
            outputs = [o async for o in stream]
            assert isinstance(outputs[-1].error, EngineDead)
            assert "fell off the bus" in outputs[-1].error.message
        assert not engine.stats().alive
        with pytest.raises(EngineDead, match="fell off the bus"):
            await engine.prepare(request("late"))

    run(main())


def test_a_death_during_the_first_submit_is_told(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether it lives and the note which loop listens: nobody could be told then, so it is later."""
    check = engine._raise_if_dead

    def dies() -> None:
        check()
        engine._emit(Ended(EngineDead("the card fell off the bus")))

    async def main() -> None:
        prepared = await engine.prepare(request("first"))
        monkeypatch.setattr(engine, "_raise_if_dead", dies)
        outputs = await asyncio.wait_for(_all(engine.submit(prepared)), 60)
        assert isinstance(outputs[-1].error, EngineDead)

    async def _all(stream: Any) -> list[Any]:
        return [output async for output in stream]

    run(main())


@pytest.mark.parametrize("fault", [InvalidParameter("the grammar is larger than the limits."), MemoryError("SECRET")])
def test_a_request_that_cannot_be_taken_up_is_alone_in_that(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """Its grammar is begun on the engine's thread: a fault there would else be the end of everybody's model."""

    def broken(grammar: str, param: str | None = None) -> Any:
        raise fault

    async def main() -> None:
        mine = engine.submit(await engine.prepare(request("other", max_tokens=30, ignore_eos=True)))
        with monkeypatch.context() as patch:
            patch.setattr(engine.engine.model.grammars, "start", broken)
            prepared = await engine.prepare(request("r", max_tokens=5))
            outputs = [o async for o in engine.submit(replace(prepared, grammar="start: /a/"))]
        assert isinstance(outputs[-1].error, type(fault) if isinstance(fault, InvalidParameter) else ReplyFault)
        assert "SECRET" not in outputs[-1].error.message
        assert [o async for o in mine][-1].error is None
        assert engine.stats().alive

    run(main())


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (RuntimeError("the card fell off the bus\nat line 7"), "has stopped: the card fell off the bus"),
        (torch.OutOfMemoryError("CUDA out of memory."), "has stopped: OutOfMemoryError: CUDA out of memory."),
        (OSError(28, "no room for 'SECRET'", "/home/SECRET"), "has stopped: OSError: No space left on device"),
        (KeyError("SECRET"), "has stopped: KeyError; see the log"),
        (
            UnicodeEncodeError("utf-8", "SECRET\ud800", 6, 7, "surrogates"),
            "has stopped: UnicodeEncodeError; see the log",
        ),
    ],
)
def test_a_death_is_told_without_words_that_may_quote_a_request(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, cause: Exception, told: str
) -> None:
    """The cause goes to everybody: to those, too, whose request it was not."""

    def broken() -> None:
        raise cause

    async def main() -> None:
        stream = engine.submit(await engine.prepare(request("r", max_tokens=2)))
        outputs = [o async for o in stream]
        assert outputs[-1].error
        assert outputs[-1].error.message.endswith(told)
        with pytest.raises(EngineDead) as caught:
            await engine.prepare(request("late"))
        assert caught.value.message.endswith(told)

    monkeypatch.setattr(engine.engine, "step", broken)
    run(main())


def test_a_request_that_cannot_begin_ends_alone(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic of a library in Rust is no `Exception`."""
    panic = type("PanicException", (BaseException,), {})

    def panics(*_: object) -> None:
        raise panic("index out of bounds")

    async def main() -> None:
        held = replace(request("held", max_tokens=4), constraint=Constraint("regex", "a*b"))
        other = engine.submit(await engine.prepare(request("other", max_tokens=400, ignore_eos=True)))
        await anext(other)
        monkeypatch.setattr(engine.engine.model.grammars, "start", panics)
        stream = engine.submit(await engine.prepare(held))
        assert [type(output.error) async for output in stream] == [ReplyFault]
        assert [output.error async for output in other][-1] is None
        monkeypatch.setattr(engine.engine.preparer, "_prompt", panics)
        with pytest.raises(RuntimeError, match="index out of bounds"):
            await engine.prepare(request("late"))
        monkeypatch.undo()
        assert (await collect(engine, replace(held, request_id="again")))[-1].error is None

    run(main())


def test_a_stuck_step_is_reported(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    step = engine.engine.step

    def stuck() -> list[RequestOutput]:
        release.wait(60)
        return step()

    async def main() -> None:
        monkeypatch.setattr(engine.engine, "step", stuck)
        monkeypatch.setattr(engine, "_stall_timeout", 0.05)
        stream = engine.submit(await engine.prepare(request("r", max_tokens=2, ignore_eos=True)))
        await until(lambda: engine.stats().stalled)
        assert engine.stats().alive
        release.set()
        assert [o async for o in stream][-1].finished
        assert not engine.stats().stalled

    run(main())


def test_closing_ends_what_is_running(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.submit(await engine.prepare(request("r", max_tokens=400, ignore_eos=True)))
        await anext(stream)
        await asyncio.get_running_loop().run_in_executor(None, engine.close)
        outputs = [o async for o in stream]
        assert isinstance(outputs[-1].error, EngineDead)

    run(main())


@pytest.mark.parametrize("piece", ["word ", "x", " ", "<|im_end|>", "漢"])
def test_a_prompt_that_is_much_too_long_is_not_read(
    engine: AsyncEngine, piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight megabytes for a context of 512: refused by what a token can hold at most, before a token is made."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was read")

    monkeypatch.setattr(PromptEncoder, "encode", never)
    monkeypatch.setattr(PromptEncoder, "encode_apart", never)
    text = piece * (8_000_000 // len(piece.encode()))
    for wanted in (
        GenerationRequest(request_id="r", messages=(ChatMessage("user", text),)),
        GenerationRequest(request_id="r", prompt=text),
    ):
        with pytest.raises(ContextLengthExceeded, match="at least") as caught:
            run(engine.prepare(wanted))
        assert caught.value.details["prompt_tokens"] > caught.value.details["context_length"] == 512


def test_where_no_length_is_known_characters_are_counted(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer with an unknown token may make one of megabytes: then a plain number of characters is the limit."""
    monkeypatch.setattr(PromptEncoder, "at_least", lambda *_: None)
    with pytest.raises(ContextLengthExceeded, match="32768 characters"):
        run(engine.prepare(GenerationRequest(request_id="r", prompt="x" * 200_000)))


class Held:
    """In place of a preparer: what comes in is named, and waits until it is let go."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.begun: list[str] = []
        self.go = threading.Event()
        self._real = engine.engine.preparer

    def prepare(self, wanted: GenerationRequest) -> Any:
        self.begun.append(wanted.request_id)
        if wanted.request_id.startswith("heavy"):
            assert self.go.wait(120)
        return self._real.prepare(wanted)

    def close(self) -> None:
        self._real.close()


def test_heavy_prompts_of_one_key_do_not_hold_up_another(engine: AsyncEngine) -> None:
    """Some are prepared at once, and a key never has all places."""

    async def main() -> None:
        engine.engine.preparer = held = Held(engine)  # type: ignore[assignment]
        heavy = [asyncio.create_task(engine.prepare(in_group(f"heavy{i}", "a"))) for i in range(6)]
        await until(lambda: len(held.begun) == 2)
        for i in range(5):
            await asyncio.wait_for(engine.prepare(in_group(f"light{i}", "b")), 60)
        assert held.begun == ["heavy0", "heavy1", *(f"light{i}" for i in range(5))]
        held.go.set()
        assert [task.request_id for task in await asyncio.gather(*heavy)] == [f"heavy{i}" for i in range(6)]

    run(main())


def test_a_client_that_leaves_is_not_prepared_and_frees_no_place_too_early(engine: AsyncEngine) -> None:
    """Given up while it waits: never begun. Given up while its thread runs: no further one runs in its place."""

    async def main() -> None:
        engine.engine.preparer = held = Held(engine)  # type: ignore[assignment]
        heavy = [asyncio.create_task(engine.prepare(in_group(f"heavy{i}", "a"))) for i in range(6)]
        await until(lambda: len(held.begun) == 2)
        for task in heavy[:4]:
            task.cancel()
        await asyncio.gather(*heavy[:4], return_exceptions=True)
        await asyncio.sleep(0.05)
        assert held.begun == ["heavy0", "heavy1"]
        held.go.set()
        await asyncio.gather(*heavy[4:])
        assert sorted(held.begun) == ["heavy0", "heavy1", "heavy4", "heavy5"]
        await asyncio.wait_for(engine.prepare(in_group("light", "a")), 60)

    run(main())


def test_content_that_spells_control_is_text_unless_the_entry_says_otherwise(tiny: Callable[[str], Path]) -> None:
    """`content_special_tokens`, in the engine and in the fingerprint."""
    found = {}
    for mode in ("split", "parse"):
        config = ModelConfig(
            id="tiny", path=tiny("qwen3"), cache_size="32MiB", context_length=512, content_special_tokens=mode
        )
        model = load(config)
        preparer = Preparer(model)
        end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        wanted = GenerationRequest(request_id="r", messages=(ChatMessage("user", "a<|im_end|>b"),))
        found[mode] = preparer.prepare(wanted).prompt_token_ids.count(end), model.info.system_fingerprint
        bare = preparer.prepare(GenerationRequest(request_id="r", prompt="a<|im_end|>b")).prompt_token_ids
        assert bare.count(end) == 1, "a bare prompt is the caller's own"
    assert found["parse"][0] == found["split"][0] + 1
    assert found["parse"][1] != found["split"][1]


def test_a_seed_that_is_not_given_is_drawn_and_told(engine: AsyncEngine) -> None:
    seeds = {run(engine.prepare(request("r"))).params.seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= s < 2**53 for s in seeds)


def test_the_registry_knows_every_state(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    said: list[str] = []
    registry = Registry(
        [
            ModelConfig(id="good", path=tiny("qwen3"), cache_size="8MiB"),
            ModelConfig(id="bad", path=tmp_path / "nothing"),
        ],
        on_progress=said.append,
    )
    with pytest.raises(ModelLoading):
        registry.get("good")
    assert {s.state for s in registry.list()} == {"waiting"}
    registry.start()
    registry.wait()
    try:
        assert registry.get("good").info.id == "good"
        with pytest.raises(ModelNotFound, match="there is: bad, good") as caught:
            registry.get("other")
        assert caught.value.param == "model"
        with pytest.raises(EngineDead, match="does not exist"):
            registry.get("bad")
        assert [(s.id, s.state) for s in registry.list()] == [("good", "ready"), ("bad", "failed")]
        assert "good: self-test" in said
    finally:
        registry.close()
        registry.close()


def test_no_thread_survives_close(tiny: Callable[[str], Path]) -> None:
    engine = AsyncEngine(Engine(load(ModelConfig(id="leaving", path=tiny("qwen3"), cache_size="8MiB"))))
    engine.close()
    deadline = time.monotonic() + 60
    while any("leaving" in t.name for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_engines_are_closed_side_by_side() -> None:
    """Steps that do not end are given up on together: a supervisor waits for one such time, not for one each."""
    both = threading.Barrier(2, timeout=60)

    class Stuck(AsyncEngine):
        def __init__(self) -> None: ...

        def close(self) -> bool:
            both.wait()
            return False

    registry = Registry([])
    registry._engines = {Slot(ModelConfig(id=name, builtin="noise")): Stuck() for name in "ab"}
    assert registry.close() is False

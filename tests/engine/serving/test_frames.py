"""What crosses a pipe arrives as it was sent; what is no message, too long, or more than data is refused."""

from __future__ import annotations

import datetime as dt
import functools
import inspect
import io
import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest

import engine.errors
from engine import (
    ChoiceDelta,
    Constraint,
    EngineStats,
    GenerationRequest,
    LoadProgress,
    ModelConfig,
    PreparedRequest,
    RequestOutput,
    SamplingParams,
    TokenCheck,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
    VerbatimError,
)
from engine.serving.process import frames
from engine.serving.process.frames import FrameError, framed, read_frame
from engine.serving.process.messages import (
    Answered,
    Ask,
    Load,
    Logged,
    NotLoaded,
    Progressed,
    Stepped,
    counters_of,
    is_busy,
    stats_of,
)
from engine.serving.protocol import Abort, Aborted, Close, Ended, Outputs, Submit

ERRORS = [kind for _, kind in inspect.getmembers(engine.errors, inspect.isclass) if issubclass(kind, VerbatimError)]
TOP = TopLogprob(7, "bytes:\\xe2", b"\xe2", float("-inf"))
TOKEN = TokenLogprob(3, "\ud800é", b"\x00\xff", -0.0, (TOP, TOP), 2)
DELTA = ChoiceDelta(
    1, "té", (3, 2**31), (TOKEN,), "stop", "hm", (ToolCall("c", "f", "{}"),), ((0.1, -1e300),), (None, 0.5),
    (TokenCheck(1, 2, -1.0, 0.5, float("inf")),), True, "", "x",
)  # fmt: skip
OUTPUT = RequestOutput("r#0", (DELTA, ChoiceDelta(0, "", ())), Usage(1, 2, 3, 4, 5, 6), True, None, (None, TOKEN))
PREPARED = PreparedRequest(request_id="r", prompt_token_ids=(1, 2), params=SamplingParams(seed=2**62, stop=("a",)))
STATS = EngineStats(
    alive=True, stalled=False, waiting=0, running=2, steps=2**40, preemptions=0, prompt_tokens=0, cached_tokens=0,
    generated_tokens=0, blocks_total=8, blocks_free=8,
)  # fmt: skip
TOLD: list[Any] = [
    Stepped(Outputs((OUTPUT, OUTPUT)), counters_of(STATS), 3),
    Stepped(None, counters_of(STATS), 0),
    Stepped(Aborted("r#0", Usage(1, 2)), (), 1),
    Stepped(Aborted("r#0", None), (), 1),
    Answered(1, PREPARED),
    Answered(2, Constraint("json", {"a": [1, 2.5, None, {"b": frozenset({1})}]})),
    Answered(3, GenerationRequest(request_id="r", clock=dt.datetime(2026, 1, 31, tzinfo=dt.UTC))),
    Answered(4, error=RuntimeError("words")),
    Answered(5, error=MemoryError("words")),
    Progressed(LoadProgress(text="reading", bytes_read=1, total_bytes=2)),
    Logged("verbatim.engine", 30, 1.5, "words", {"a": "b"}, ("Traceback", "  line")),
]
SENT: list[Any] = [
    Load(ModelConfig(id="m", path=Path("/m"), template_clock=dt.datetime(2026, 1, 1)), False, ({"cuda:0": 5},), 30),
    Ask(7, "prepare", GenerationRequest(request_id="r", prompt="a\ud800")),
    Submit(PREPARED),
    Abort("r#0"),
    Close(),
]


def through(message: object, *, plain_only: bool = True) -> Any:
    return read_frame(io.BytesIO(framed(message, plain_only=plain_only)), plain_only=plain_only)


@pytest.mark.parametrize("message", TOLD, ids=repr)
def test_what_a_process_tells_arrives(message: Any) -> None:
    arrived = through(message)
    assert type(arrived) is type(message)
    assert repr(arrived) == repr(message), "with repr, -0.0 is not 0.0"


@pytest.mark.parametrize("message", SENT, ids=repr)
def test_what_a_process_is_told_arrives(message: Any) -> None:
    assert through(message, plain_only=False) == message


def test_counters_are_those_that_were_read() -> None:
    assert stats_of(counters_of(STATS)) == STATS
    assert is_busy(counters_of(STATS))


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_keeps_what_it_says(kind: type[VerbatimError]) -> None:
    """Whichever way it crosses: a model that does not fit, a request that is refused, an engine that has died."""
    error = kind("a sentence é.", param="messages.0.role", code="own", needed=2**40, names=["a"])
    error.message = "another sentence."  # `load` writes the entry's name before it
    for arrived in (
        through(NotLoaded(error)).error,
        through(Answered(0, error=error)).error,
        through(Ended(error)).error,
    ):
        assert type(arrived) is kind
        for name in ("message", "param", "code", "details"):
            assert getattr(arrived, name) == getattr(error, name), name
    plain = through(Ended(kind("a sentence."))).error
    assert (plain.code, plain.param, plain.details) == (kind.code, None, {})


class _Call:
    """A pickle that calls something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    "harm",
    [
        _Call(os.system, "echo"),
        _Call(eval, "1 + 1"),
        _Call(getattr, dt.datetime, "now"),
        _Call(functools.partial, print),
        _Call(engine.errors.trace_lines, None),
        _Call(__import__, "this"),
        Path("/etc"),
        ModelConfig(id="m", builtin="noise"),
    ],
    ids=lambda harm: harm._call[0].__name__ if isinstance(harm, _Call) else type(harm).__name__,
)
def test_a_process_cannot_make_its_parent_call_anything(harm: Any) -> None:
    """It reads what strangers wrote. A checkpoint that takes it over gets no further by what it sends."""
    with pytest.raises(FrameError, match="is not expected from a model's process"):
        read_frame(io.BytesIO(framed(Answered(0, harm))), plain_only=True)


@pytest.mark.parametrize(
    "odd", [*(kind(3) for kind in (numpy.int64, numpy.float32, Fraction)), OrderedDict(a=1), print, Path, Path("/a")]
)
def test_what_would_not_be_taken_is_not_sent(odd: Any) -> None:
    """A script's request may hold it; its answer fails alone, where a message that cannot be read ends the model."""
    with pytest.raises(pickle.PicklingError, match="is no data of a model's process"):
        framed(Answered(0, replace(PREPARED, prediction=(1, odd))), plain_only=True)


def test_frames_follow_each_other_and_end_anywhere() -> None:
    """A process that is killed may end within a message, which nobody has to hear of."""
    one, two = framed(Abort("a")), framed(Close())
    file = io.BytesIO(one + two)
    assert [read_frame(file, plain_only=True) for _ in range(3)] == [Abort("a"), Close(), None]
    for end in range(len(one)):
        assert read_frame(io.BytesIO(one[:end]), plain_only=True) is None


@pytest.mark.parametrize("data", [b"\x00\x00\x00\x03abc", b"\x00\x00\x00\x01\x80", b"\xff\xff\xff\xff"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        read_frame(io.BytesIO(data + bytes(8)), plain_only=True)


def test_frames_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MOST", 1000)
    whole = framed(Abort("x" * 800))
    assert read_frame(io.BytesIO(whole), plain_only=True) == Abort("x" * 800)
    with pytest.raises(FrameError, match="is over 1000"):
        framed(Abort("x" * 1000))
    monkeypatch.setattr(frames, "MOST", 700)
    with pytest.raises(FrameError, match="is over 700"):
        read_frame(io.BytesIO(whole), plain_only=True)


def test_a_body_as_deep_as_a_server_takes_crosses() -> None:
    """server/json_text.py allows 100 levels; these are 150."""
    deep: Any = 1
    for _ in range(75):
        deep = {"a": [deep]}
    assert through(Answered(0, Constraint("json", deep))).value.value == deep


def test_the_largest_answer_that_is_allowed_fits() -> None:
    """2^19 log-probabilities of one prompt (engine/preparation.py): tried with a share of them, all distinct."""
    count = 1 << 12
    entries = tuple(TokenLogprob(i, f"t{i}", b"t%d" % i, -i / 3, (), i) for i in range(count))
    size = len(framed(Stepped(Outputs((RequestOutput("r", (), Usage(1, 1), prompt_logprobs=entries),)), (), 0)))
    assert size * (1 << 19) // count < frames.MOST // 8

"""Measure one loaded model: time to the first token, tokens per second, memory. Bounded in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:
    from engine import LLM

__all__ = ["Measured", "measure"]

_WORDS: Final = "the quick brown fox jumps over the lazy dog and runs through the long green grass "
_SECONDS: Final = 10.0
"""For each figure; a slow model is measured on fewer tokens."""
_PROMPT: Final = 512
_TOKENS: Final = 128
_STREAMS: Final = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one model.

    Attributes:
        load_seconds: from nothing to ready, libraries and self-test included.
        first_token_seconds: of a prompt of a few tokens, when nothing else runs.
        prompt_rate, decode_rate, decode_rate_8: tokens per second; the last is the sum of eight streams.
        memory_bytes: of the process, with the model and its cache.
    """

    load_seconds: float
    first_token_seconds: float
    prompt_tokens: int
    prompt_rate: float
    decode_rate: float
    decode_rate_8: float
    memory_bytes: int


def measure(llm: LLM, load_seconds: float, say: Callable[[str], None]) -> Measured:
    """Measure a loaded model, in less than a minute. `say`: told what is measured."""
    _decode(llm, 1, 8)  # what the first request alone pays
    say("time to first token")
    first = min(_first_token(llm, f"{number} ") for number in range(3))
    say("prompt")
    tokens, seconds = _prompt(llm)
    say("decode, one stream")
    one = _decode(llm, 1, _TOKENS)
    say(f"decode, {_STREAMS} streams")
    many = _decode(llm, _STREAMS, _TOKENS)
    memory = int(psutil.Process().memory_info().rss)
    return Measured(load_seconds, first, tokens, tokens / seconds, one, many, memory)


def _first_token(llm: LLM, begin: str) -> float:
    began = time.perf_counter()
    for _ in llm.stream(begin + _WORDS, max_tokens=1, ignore_eos=True):
        break
    return time.perf_counter() - began


def _prompt(llm: LLM) -> tuple[int, float]:
    """Return how many tokens a long prompt has, and the seconds until its first token."""
    room = max(llm.info.context_length - _TOKENS, 16)
    text = _WORDS * (min(_PROMPT, room) // 32 + 1)
    added = llm.add("@" + text, max_tokens=1, ignore_eos=True)
    tokens = len(added.prompt_token_ids)
    began = time.perf_counter()
    for _ in llm.outputs(added.request_id):
        pass
    return tokens, time.perf_counter() - began


def _decode(llm: LLM, streams: int, most: int) -> float:
    """Return tokens per second of some streams together, without the time of their prompts."""
    most = min(most, max(llm.info.context_length - 64, 2))
    engine, ids = llm.engine, []
    for number in range(streams):
        prepared = engine.prepare(llm.request(f"{number} {_WORDS}", max_tokens=most, ignore_eos=True, seed=number))
        engine.add(prepared)
        ids.append(prepared.request_id)
    begun: set[str] = set()
    counted, since = 0, 0.0
    try:
        while engine.has_work:
            for output in engine.step():
                new = sum(len(delta.token_ids) for delta in output.deltas)
                if len(begun) == streams:
                    counted += new
                elif new:
                    begun.add(output.request_id)
                    since = time.perf_counter()
            if len(begun) == streams and time.perf_counter() - since > _SECONDS:
                break
    finally:
        seconds = time.perf_counter() - since
        for request_id in ids:
            engine.abort(request_id)
    return counted / seconds if counted else 0.0

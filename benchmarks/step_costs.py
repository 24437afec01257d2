"""What an engine step costs beside its forward pass, part by part, in this process. Knows no HTTP.

Everything runs on one thread, so that CPU time is the time of the code at hand; all results are microseconds of CPU per
token at a given number of streams.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import fixed_prompt
from engine.config import ModelConfig
from engine.engine import Engine
from engine.loading.loader import load
from engine.model import LoadedModel
from engine.replies.reply_stream import TextStream
from engine.sampling.sampler import Sampler
from engine.scheduling.block_pool import BLOCK_SIZE, BlockPool
from engine.scheduling.schedule import Schedule
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.text.vocabulary import Vocabulary
from engine.types.requests import PreparedRequest
from engine.types.sampling_params import SamplingParams

Measure = Callable[[], float]

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "greedy, 5 top_logprobs": {"temperature": 0.0, "logprobs": True, "top_logprobs": 5},
}


def open_model(path: Path, streams: int) -> LoadedModel:
    torch.set_num_threads(1)
    return load(ModelConfig(id="bench", path=path, device="cpu", threads=1, max_sequences=streams))


class _TimedRunner:
    """A runner that notes its CPU time."""

    lookahead = None

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size = inner.vocab_size
        self.seconds = 0.0

    def forward(self, schedule: Schedule) -> Any:
        start = time.process_time()
        try:
            return self._inner.forward(schedule)
        finally:
            self.seconds += time.process_time() - start

    def forget(self, sequence: Any) -> None:
        self._inner.forget(sequence)

    def release_memory(self, *, again: bool = False) -> bool:
        return bool(self._inner.release_memory(again=again))


class Steps:
    """Whole `Engine.step`s of decoding, split into the forward pass and all the rest."""

    def __init__(self, model: LoadedModel, streams: int, tokens: int) -> None:
        self._runner = _TimedRunner(model.runner)
        self._engine = Engine(dataclasses.replace(model, runner=self._runner))
        self._streams, self._tokens = streams, tokens
        self._vocab_size = model.info.vocab_size
        self._numbers = itertools.count()

    def measure(self, sampling: dict[str, Any]) -> tuple[float, float]:
        """(forward, the rest): prompts are computed before the clock starts."""
        names = [self._add(sampling) for _ in range(self._streams)]
        engine = self._engine
        for _ in names:  # at least one prompt ends in each step
            if len(engine.step()) == len(names):
                break
        forward, start = self._runner.seconds, time.process_time()
        for _ in range(self._tokens):
            engine.step()
        total = time.process_time() - start
        forward = self._runner.seconds - forward
        for name in names:
            engine.abort(name)
        scale = 1e6 / (self._streams * self._tokens)
        return forward * scale, (total - forward) * scale

    def _add(self, sampling: dict[str, Any]) -> str:
        number = next(self._numbers)
        params = SamplingParams(
            **{"seed": number, "ignore_eos": True, **sampling, "max_tokens": self._tokens + self._streams + 8}
        )
        prompt = fixed_prompt(16, self._vocab_size, number)
        request = PreparedRequest(request_id=f"r{number}", prompt_token_ids=tuple(prompt), params=params)
        self._engine.add(request)
        return request.request_id


def scheduler(streams: int, tokens: int) -> float:
    """`schedule` and `commit` with a token appended in between; there is no model."""
    plan = Scheduler(
        BlockPool(streams * (-(-(tokens + 32) // BLOCK_SIZE) + 1), BLOCK_SIZE, caching=True),
        max_sequences=streams,
        max_batch_tokens=512,
    )
    params = SamplingParams(max_tokens=tokens + 8)
    sequences = [Sequence(f"r{i}", 0, tuple(fixed_prompt(16, 1000, i)), params, seed=0) for i in range(streams)]
    for sequence in sequences:
        plan.add([sequence])
    seconds = 0.0
    for number in range(tokens + 1):
        start = time.process_time()
        plan.commit(plan.schedule())
        seconds += time.process_time() - start if number else 0.0  # the first step is the prompts'
        for sequence in sequences:
            sequence.append(number % 1000)
    return seconds * 1e6 / (streams * tokens)


def sampler(vocab_size: int, sampling: dict[str, Any], streams: int, steps: int) -> float:
    """Rows of made-up logits with a spread like a model's."""
    chooser = Sampler(vocab_size, [], [0], torch.device("cpu"))
    noise = torch.randn(streams, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    params = SamplingParams(**{"max_tokens": steps + 8, **sampling})
    rows = [Sequence(f"r{i}", 0, (1, 2, 3), params, seed=i) for i in range(streams)]
    chooser.sample(noise, rows)
    start = time.process_time()
    for _ in range(steps):
        for row, sampled in zip(rows, chooser.sample(noise, rows), strict=True):
            row.append(sampled.token_id)  # type: ignore[union-attr]
    return (time.process_time() - start) * 1e6 / (streams * steps)


def detokenizer(vocabulary: Vocabulary, stop: tuple[str, ...], tokens: int) -> float:
    """`TextStream.push`, ids that look arbitrary."""
    ids = [i for i in fixed_prompt(tokens, vocabulary.size, 3) if vocabulary.is_text(i)]
    stream = TextStream(vocabulary, stop)
    start = time.process_time()
    for token in ids:
        stream.push(token)
    return (time.process_time() - start) * 1e6 / len(ids)

"""Compute the largest step that a model may be asked for, to measure the memory it takes. Knows no device.

All sequences share the few blocks of a small cache: their block tables name each block many times, so that a step over
the longest context costs no more cache than a short one. What is computed means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from engine.compute.model_runner import Runner
from engine.sampling.sampler import Sampler
from engine.scheduling.block_pool import BLOCK_SIZE
from engine.scheduling.schedule import Chunk, Draw, Schedule
from engine.scheduling.sequence import Sequence
from engine.types.sampling_params import SamplingParams

__all__ = ["LargestStep"]

_PARAMS = SamplingParams(temperature=1.0, top_p=0.95, repetition_penalty=1.1, logprobs=True, top_logprobs=20)
"""Every kind of work that the sampler has: edits, a sort of the vocabulary, a draw, a description."""


@dataclass(frozen=True, slots=True)
class LargestStep:
    """The size of the largest step.

    Attributes:
        tokens: of prompts; logit_rows: of logits in it; sequences: that decode at once; context: tokens before each.
    """

    tokens: int
    logit_rows: int
    sequences: int
    context: int

    @property
    def num_blocks(self) -> int:
        """How many blocks a cache for it must have: no two tokens of one chunk may share a slot."""
        return -(-min(self.tokens, self.context) // BLOCK_SIZE) + 1

    def run(self, runner: Runner, device: torch.device) -> None:
        """Compute a step of prompts and one of decodes at the end of the context, and sample after each."""
        sampler = Sampler(runner.vocab_size, (), (), device)
        text = tuple(i % runner.vocab_size for i in range(self.context))
        self._compute(runner, sampler, self._prompts(text))
        self._compute(runner, sampler, [self._chunk(text, 1, 1) for _ in range(self.sequences)])

    def _prompts(self, text: tuple[int, ...]) -> list[Chunk]:
        chunks: list[Chunk] = []
        tokens, rows = self.tokens, self.logit_rows
        while tokens > 0 and len(chunks) < self.sequences:
            count = min(tokens, self.context)
            chunks.append(self._chunk(text, count, min(rows, count)))
            tokens, rows = tokens - count, rows - min(rows, count)
        return chunks

    def _chunk(self, text: tuple[int, ...], count: int, rows: int) -> Chunk:
        """Make a sequence that fills the context, and the chunk of its last `count` tokens."""
        table = [i % self.num_blocks for i in range(-(-self.context // BLOCK_SIZE))]
        sequence = Sequence("", 0, text, _PARAMS, 0, block_table=table)
        return Chunk(sequence, self.context - count, count, samples=True, num_rows=rows)

    def _compute(self, runner: Runner, sampler: Sampler, chunks: Seq[Chunk]) -> None:
        logits = runner.forward(Schedule(list(chunks))).logits
        draws = [Draw(chunk.sequence, 0) for chunk in chunks for _ in range(chunk.num_rows)]
        rows = list(range(len(draws)))
        allowed = np.full((len(draws), -(-runner.vocab_size // 32)), -1, dtype=np.int32)
        sampler.sample(logits, draws, rows, allowed)
        sampler.describe(logits, rows, [1] * len(rows), [20] * len(rows))

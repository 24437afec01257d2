"""Run fixed texts through the runner that will serve, in ways that must not change a bit. Judges nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from engine.compute import rotary
from engine.compute.backend import Backend, StepSize
from engine.compute.kv_cache import KVCache, LayerShape, runs_of
from engine.compute.model_runner import Runner
from engine.scheduling.block_pool import BLOCK_SIZE, BlockPool
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.types.sampling_params import SamplingParams

__all__ = ["DECODED", "Packed", "Run", "Text", "equal", "generate", "on_one_thread"]

DECODED: Final = 3
"""Tokens that are appended to each text."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, fixed tokens that are appended to it in place of the model's own, and the adapter that computes it."""

    prompt: tuple[int, ...]
    rest: tuple[int, ...]
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """What a runner computed for one text.

    Attributes:
        logits: `[DECODED, vocab] float32`: of the prompt's last token and of those that follow.
        stored: the keys and values of the text's full blocks in all layers; None in the fallback runner.
    """

    logits: Tensor
    stored: tuple[Tensor, ...] | None = None

    def equals(self, other: Run) -> bool:
        """Tell whether all bits are the same."""
        if not torch.equal(self.logits, other.logits):
            return False
        pairs = zip(self.stored or (), other.stored or (), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


class Packed:
    """Generates texts with the packed runner, each time with an empty cache."""

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        layers: tuple[LayerShape, ...],
        vocab_size: int,
        length: int,
        *,
        row_safe: bool,
        skips_masks: bool,
    ) -> None:
        self.layers, self.skips_masks, self.row_safe = layers, skips_masks, row_safe
        self._model, self._backend, self._vocab_size, self._length = model, backend, vocab_size, length
        last = length - 1
        borders = (place for border in rotary.original_lengths(model) for place in (border - 1, border))
        self._far = (last, last // 2, 0, *(place for place in borders if 0 < place < last))

    def run(self, texts: Seq[Text], *, budget: int = 512, far: bool = False, single_rows: bool = False) -> list[Run]:
        """Generate through the real scheduler, `budget` tokens a step; `far`: with rows at far positions beside."""
        if not texts:
            return []
        blocks = sum(-(-(len(t.prompt) + DECODED) // BLOCK_SIZE) for t in texts)
        cache = self._backend.allocate(self.layers, blocks)
        runner = self._backend.runner(
            self._model,
            cache,
            self._vocab_size,
            StepSize(budget + len(texts), len(texts), self._length),
            single_rows=single_rows,
            row_safe=self.row_safe,
            skips_masks=self.skips_masks,
            bystanders=self._far if far else (),
        )
        pool = BlockPool(blocks, BLOCK_SIZE, caching=False)
        scheduler = Scheduler(pool, max_sequences=len(texts), max_batch_tokens=budget)
        return generate(runner, scheduler, texts, cache)


def generate(runner: Runner, scheduler: Scheduler, texts: Seq[Text], cache: KVCache | None = None) -> list[Run]:
    """Compute all texts at once with a runner. `cache`: the runner's, if its contents are to be compared."""
    params = SamplingParams(max_tokens=DECODED)
    sequences = [Sequence(str(i), 0, text.prompt, params, 0, adapter=text.adapter) for i, text in enumerate(texts)]
    rest = {sequence: text.rest for sequence, text in zip(sequences, texts, strict=True)}
    seen: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in sequences}
    stored: dict[Sequence, tuple[Tensor, ...] | None] = {}
    for sequence in sequences:
        scheduler.add([sequence])
    while scheduler.has_work:
        schedule = scheduler.schedule()
        result = runner.forward(schedule)
        for fault in result.errors.values():
            raise fault
        logits = iter(result.logits.cpu())
        scheduler.commit(schedule)
        for sequence in [chunk.sequence for chunk in schedule.chunks if chunk.samples]:
            seen[sequence].append(next(logits))
            sequence.append(rest[sequence][sequence.position])
            if sequence.position == DECODED:
                stored[sequence] = None if cache is None else _stored(cache, sequence.block_table)
                scheduler.finish(sequence)
                runner.forget(sequence)
    return [Run(torch.stack(seen[sequence]), stored[sequence]) for sequence in sequences]


def _stored(cache: KVCache, table: Seq[int]) -> tuple[Tensor, ...]:
    """Copy a sequence's full blocks in all layers: they show differences that the logits of a few rows may hide."""
    if len(table) < 2:
        return ()
    runs = runs_of(table, (len(table) - 1) * BLOCK_SIZE)
    tensors = (*cache.keys, *cache.values)
    return tuple(torch.cat([t[:, run.start : run.start + run.length] for run in runs], 1) for t in tensors)


def equal(a: Seq[Run], b: Seq[Run]) -> bool:
    return all(one.equals(two) for one, two in zip(a, b, strict=True))


def on_one_thread(test: Callable[[], bool]) -> bool:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return test()
    finally:
        torch.set_num_threads(threads)

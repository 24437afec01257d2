"""Chooses the next token of every row: logits in, token ids and log-probabilities out.

Knows nothing of text, of stopping or of the model. A draw is the Gumbel-max trick with the stateless bits of
`engine.sampling.rng`, so it depends on the row's logits, parameters, seed, choice and position alone.

    token = argmax over kept ids i of  (logit_i - largest) / T + gumbel(seed, choice, position, i)    lowest id on ties

(float64; the shift by the largest logit is shared by all tokens and changes no draw.) The Gumbel value is computed for
a handful of tokens only, those that can still win: see `engine.sampling.contenders`. On a GPU a call sends once and
reads once.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import NumericalFault, VerbatimError
from engine.sampling.answers import Described, Sampled, SamplingRow, described
from engine.sampling.batch import Batch, Picked, TokenColumns
from engine.sampling.drawing import Drawing
from engine.sampling.edits import Edits, ban_table, bans
from engine.sampling.logits import MAX_VOCABULARY, largest, masses, order_keys, scaled
from engine.sampling.rng import token_steps
from engine.sampling.transfer import Readback, Rows, Upload

__all__ = ["Described", "Drawing", "Sampled", "Sampler", "SamplingRow"]

_CHUNK_CPU: Final = 2**18  # logits looked at together: the temporaries of one such chunk stay in the cache
_CHUNK_DEVICE: Final = 2**24
_HEAD_DEVICE: Final = 1024  # tokens that a GPU sorts at first: a second attempt costs more there than sorting them
_CACHED_PROMPTS: Final = 64


class Sampler:
    """Samples batches for one model. Use it from one thread at a time.

    Args:
        vocab_size: columns of the model's logits, padding rows included.
        invalid_ids: columns that are no token of the tokenizer; never produced, never listed.
        end_ids: tokens that end a reply; banned, with `stop_token_ids`, before `min_tokens`.
        device: where the logits will be.

    Raises:
        ValueError: a vocabulary that is too large, or in which no id is valid.
    """

    def __init__(
        self, vocab_size: int, invalid_ids: Sequence[int], end_ids: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        if vocab_size > MAX_VOCABULARY:
            raise ValueError(f"a vocabulary may have at most {MAX_VOCABULARY} tokens, not {vocab_size}")
        self.vocab_size = vocab_size
        self.end_ids = tuple(end_ids)
        self.device = torch.device(device)
        invalid = {i for i in invalid_ids if 0 <= i < vocab_size}
        if len(invalid) == vocab_size:
            raise ValueError(f"none of the {vocab_size} token ids is valid")
        # Padding rows stand at the end: columns from `width` on are never looked at, which needs no mask.
        width = 1 + max(i for i in range(vocab_size) if i not in invalid)
        holes = sorted(i for i in invalid if i < width)
        on_cpu = self.device.type == "cpu"
        self._columns = TokenColumns(
            width,
            torch.tensor(holes, dtype=torch.int64, device=self.device),
            token_steps(width, self.device),
            max(1, (_CHUNK_CPU if on_cpu else _CHUNK_DEVICE) // vocab_size),
            head=None if on_cpu else _HEAD_DEVICE,
            sorts_all=not on_cpu,
        )
        self._ban_table = ban_table(self.device)
        self._prompts: OrderedDict[int, tuple[tuple[int, ...], Tensor]] = OrderedDict()

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        logit_rows: Sequence[int] | None = None,
        allowed: NDArray[np.int32] | None = None,
    ) -> list[Sampled | VerbatimError]:
        """Choose one token for every row.

        `logprobs_mode` raw: of the untouched logits over the whole model vocabulary. processed: of the distribution
        that is drawn from, after temperature and filters; for temperature 0, of the edited and masked logits. Both in
        float64, from an integer sum of masses: the same bits in any batch (see `engine.sampling.logits`).

        Args:
            logits: float32 `[logit rows, vocab_size]`; remains the caller's, never written to.
            rows: what to choose, in the order of the answer.
            logit_rows: which row of `logits` each of `rows` draws from; several may share one, and rows that none
                draws from are not looked at. None: the same order.
            allowed: int32 `[rows, ceil(vocab_size / 32)]`. A grammar forbids token `i` where bit `i % 32` of word
                `i // 32` is not set. Applied last.

        Returns:
            One result a row. A row that cannot be answered holds an error, the others are unaffected: `NumericalFault`
            where the logits hold NaN or +inf, or nothing but -inf; `InvalidParameter` (code `no_token_left`) where
            biases, `min_tokens` and the grammar together forbid every token.
        """
        return self.start(logits, rows, logit_rows, allowed).finish() if rows else []

    @torch.inference_mode()
    def start(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        logit_rows: Sequence[int] | None = None,
        allowed: NDArray[np.int32] | None = None,
    ) -> Drawing:
        """Do the device's part of `sample`, of which a GPU's host waits for nothing. `Drawing.finish` does the rest.

        Args: as `sample`; there is at least one row. `logits` must not be written to before `finish` has returned.
        """
        assert rows
        assert logits.dtype == torch.float32, logits.dtype
        assert logits.shape[1] == self.vocab_size, logits.shape
        sources = list(range(len(rows)) if logit_rows is None else logit_rows)
        upload = Upload(self.device)
        wanted = sorted(set(sources))
        used = None
        if len(wanted) < len(logits):
            used = Picked(wanted, wanted, upload)
            at = {row: place for place, row in enumerate(wanted)}
            sources = [at[row] for row in sources]
        batch = Batch(rows, range(len(rows)), sources, self._columns, upload)
        edits = self._edits(batch.rows)
        if edits:
            edits.pack(upload)
        mask = None if allowed is None else upload.words(allowed[batch.names].tobytes())
        upload.send()
        if used is not None:
            logits = used.of(logits)
        work = self._edited(logits, batch, edits, None if mask is None else mask.tensor.view(len(rows), -1))
        return Drawing(rows, sources, self._columns, batch, logits, work)

    # Edits

    def _edits(self, rows: Sequence[SamplingRow]) -> Edits:
        """Collect what changes the logits of some rows."""
        edits = Edits(self._columns.width)
        for i, row in enumerate(rows):
            p = row.params
            if p.logit_bias:
                edits.bias(i, p.logit_bias)
            if p.repetition_penalty != 1.0:
                prompt = self._prompt_ids(row.prompt_token_ids)
                edits.repetition(i, prompt, list(row.output_counts), p.repetition_penalty)
            if p.frequency_penalty or p.presence_penalty:
                edits.penalties(i, row.output_counts, p.frequency_penalty, p.presence_penalty)
            if row.generated < p.min_tokens:
                edits.ban(i, self.end_ids + p.stop_token_ids)
        return edits

    def _edited(self, logits: Tensor, batch: Batch, edits: Edits, mask: Tensor | None) -> Tensor:
        """Return the logits to choose from, `[rows, width]`: a view of the caller's if nothing changes, else a copy."""
        tokens, holes = logits[:, : self._columns.width], self._columns.holes
        untouched = not edits and mask is None and not holes.numel()
        if untouched and batch.sources == list(range(len(batch))):
            return tokens[: len(batch)]
        work = tokens.index_select(0, batch.source_index)
        if edits:
            edits.apply(work)
        if holes.numel():
            work.index_fill_(1, holes, -math.inf)
        if mask is not None:
            work.masked_fill_(bans(mask, self._ban_table)[:, : work.shape[1]], -math.inf)
        return work

    def _prompt_ids(self, prompt: tuple[int, ...]) -> Tensor:
        """Return the distinct ids of a prompt. They are kept, because each step of a reply has the same prompt."""
        name = id(prompt)  # stays its own as long as the entry holds the tuple
        if name not in self._prompts:
            upload = Upload(self.device)
            ids = upload.ints(sorted({i for i in prompt if i < self._columns.width}))
            upload.send()
            self._prompts[name] = (prompt, ids.tensor)
            if len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(name)
        return self._prompts[name][1]

    @torch.inference_mode()
    def describe(
        self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Described | NumericalFault]:
        """Describe given tokens by the raw distribution over the whole model vocabulary. Chooses nothing.

        Args:
            logits: as in `sample`.
            rows: which row of `logits` describes each of `tokens`.
            tops: how many of the likeliest tokens to tell beside each.
        """
        upload, readback = Upload(self.device), Readback()
        picked = Picked(list(range(len(rows))), list(rows), upload)
        given = upload.ints(tokens)
        upload.send()
        found: list[Described | NumericalFault] = []
        for part in picked.parts(self._columns.chunk):
            count = min(max(tops[i] for i in part.names), self._columns.width)
            chosen = given.tensor[part.names[0] : part.names[-1] + 1].unsqueeze(1)

            def add(*columns: Rows, names: list[int] = part.names) -> None:
                for name, (peak,), (score,), (mass,), (rank,), scores, ids in zip(names, *columns, strict=True):
                    found.append(described(tokens[name], tops[name], peak, score, mass, rank, scores, ids))

            readback.add(add, *self._description(part.of(logits), chosen, count))
        readback.fetch()
        return found

    def _description(self, logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, ...]:
        """Compute what `described` reads, of some rows: peak, score, mass, rank, `count` scores and ids."""
        listed = logits[:, : self._columns.width]
        if self._columns.holes.numel():
            listed = listed.index_fill(1, self._columns.holes, -math.inf)
        peaks, keys = logits.amax(-1, keepdim=True), order_keys(listed.nan_to_num())
        ranks = (keys > keys.gather(1, chosen)).sum(-1, keepdim=True)
        scores = scaled(logits, peaks.double())
        total = masses(scores.nan_to_num()).sum(-1, keepdim=True)
        ids = largest(keys, count) if count else chosen[:, :0]
        likeliest = scaled(listed.gather(1, ids), peaks.double())
        return peaks, scores.gather(1, chosen), total, ranks, likeliest, ids

"""Run one forward pass for all sequences of a step. Knows tokens, slots and logits; no request, sampling or text.

Two runners with one interface. `PackedRunner` computes all sequences of a step in one `[1, T]` pass over the block
cache. `FallbackRunner` serves architectures that the packed pass does not reproduce (own attention, recurrent layers):
each sequence alone, with transformers' own cache. The self-test decides which one a model gets, not its name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.compute import rotary
from engine.compute.attention import attention_through, blank_mask
from engine.compute.attention_mask import NotUnderstood
from engine.compute.backend import Backend, PackedChunk, StepPlan
from engine.compute.discovery import CACHE_NAMES, cache_name, input_device
from engine.compute.kv_cache import KVCache
from engine.compute.row_safe import RowSafeFunctions
from engine.errors import ReplyFault, out_of_memory
from engine.sampling.transfer import HostCopy
from engine.scheduling.block_pool import BLOCK_SIZE
from engine.scheduling.schedule import Chunk, Schedule
from engine.scheduling.sequence import Sequence

log = logging.getLogger("verbatim.engine")


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """The result of a step's forward pass.

    Attributes:
        logits: `[n, vocab] float32`, each chunk's `num_rows` rows, in order.
        finite: tells for each chunk of the schedule whether all its keys and values were finite, its draft's aside. On
            a GPU it waits until the pass has been computed: ask after the sampler has read its numbers back.
        errors: of chunks that could not be computed, by their number; their logits mean nothing.
    """

    logits: Tensor
    finite: Callable[[], Seq[bool]]
    errors: Mapping[int, ReplyFault] = field(default_factory=dict)


class Lookahead(Protocol):
    """Launches a step before the tokens of the one before it have reached the host."""

    def launch(self, sequences: Seq[Sequence], tokens: Seq[Tensor]) -> None:
        """Compute the next token's row of some sequences, each behind the token that it is drawing.

        The next `forward` returns what was launched, if its schedule asks for nothing else: neighbours change no bit.
        Where there is no memory for it, nothing is launched.

        Args:
            sequences: have a block for that row, which nobody else reads.
            tokens: `[1] int64` each, on the device: what each is drawing.
        """

    def confirm(self, tokens: Seq[int]) -> None:
        """Say what the device took for the tokens, once it is known."""


class Runner(Protocol):
    """Computes the forward pass of each step."""

    vocab_size: int

    @property
    def lookahead(self) -> Lookahead | None:
        """What launches steps ahead of time; None where each is computed when it is asked for."""

    def forward(self, schedule: Schedule) -> ForwardResult: ...

    def forget(self, sequence: Any) -> None:
        """Drop the state of a sequence that was finished, aborted or preempted."""

    def release_memory(self, *, again: bool = False) -> bool:
        """Give freed memory back to the device, after a step that did not fit.

        Args:
            again: the same was done for this step already, and it did not fit once more.

        Returns:
            Whether enough may be free now to try the same step once more.
        """


class _Model:
    """A causal language model, called for the logits of some rows only. `keeps`: it takes them as `logits_to_keep`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = input_device(model)
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, tokens: Tensor, rows: Tensor, **kwargs: Any) -> Any:
        """Run `tokens [1, T] int64` and keep the logits of `rows [n] int64`: `[1, n, vocab]` in the model's output."""
        if self.keeps:
            output = self.model(tokens, logits_to_keep=rows, **kwargs)
        else:
            output = self.model(tokens, **kwargs)
            output.logits = output.logits[:, rows.to(output.logits.device)]
        # Spread over devices, accelerate's hooks bring them back: the sampler has its tables there.
        assert output.logits.device == self.device, f"its logits arrive on {output.logits.device}, not on {self.device}"
        return output


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The chunks of a schedule as one row of tokens.

    Attributes:
        tokens, positions: of each row.
        chunks: where each chunk's rows and keys are.
        kept: the rows whose logits are wanted, in order.
        real: rows of each chunk that are no draft.
    """

    tokens: list[int]
    positions: list[int]
    chunks: list[PackedChunk]
    kept: list[int]
    real: list[int]

    @classmethod
    def of(cls, schedule: Schedule) -> PackedStep:
        """Pack a schedule's chunks one behind the other."""
        step = cls([], [], [], [], [])
        for chunk in schedule.chunks:
            table = chunk.sequence.block_table[: -(-(chunk.start + chunk.count) // BLOCK_SIZE)]
            step.add(chunk.tokens, chunk.start, tuple(table), chunk.num_rows, len(chunk.draft), chunk.sequence.adapter)
        return step

    def add(
        self, tokens: Seq[int], start: int, table: tuple[int, ...], kept: int, drafted: int = 0, adapter: str = ""
    ) -> None:
        """Append a chunk whose last `kept` rows are wanted, and whose last `drafted` ones are a draft."""
        self.chunks.append(PackedChunk(len(self.tokens), len(tokens), start, table, adapter))
        self.tokens.extend(tokens)
        self.positions.extend(range(start, start + len(tokens)))
        self.kept.extend(range(len(self.tokens) - kept, len(self.tokens)))
        self.real.append(len(tokens) - drafted)

    def told(self, finite: Tensor) -> Callable[[], tuple[bool, ...]]:
        """Start to copy `finite`, `[rows]` or more, to the host: true where a row is finite.

        Returns:
            What waits for the copy and tells for each chunk whether all its rows are finite, its draft's aside: a wrong
            guess is nobody's fault.
        """
        copy = HostCopy(finite)

        def tell() -> tuple[bool, ...]:
            rows = copy.read()
            return tuple(all(rows[c.row : c.row + real]) for c, real in zip(self.chunks, self.real, strict=True))

        return tell


class PackedRunner:
    """Computes all sequences of a step in one pass over the block cache."""

    lookahead = None

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        cache: KVCache,
        vocab_size: int,
        *,
        single_rows: bool = False,
        row_safe: bool = False,
        skips_masks: bool = False,
        bystanders: Seq[int] = (),
    ) -> None:
        """Serve a model from a cache that `backend` allocated; the self-test decides the keywords.

        Args:
            single_rows: a row computed alone has the same bits as among others, so it needs no padding.
            row_safe: the model calls functions of torch that need `RowSafeFunctions`.
            skips_masks: the model computes the same if it is kept from making masks.
            bystanders: positions of rows that belong to no sequence and are computed in every step, for the self-test.
        """
        self._model = _Model(model)
        self._fewest = 1 if single_rows else 2
        self._functions: Callable[[], AbstractContextManager[Any]] = RowSafeFunctions if row_safe else nullcontext
        masks = {"attention_mask": blank_mask(self._model.device)} if skips_masks else {}
        self._keywords: dict[str, Any] = {"use_cache": False} | masks
        self._bystanders = list(bystanders)
        self._backend = backend
        self.cache = cache
        self.vocab_size = vocab_size

    @torch.inference_mode()
    def forward(self, schedule: Schedule) -> ForwardResult:
        """Copy the blocks that the schedule names, compute its chunks and store their keys and values."""
        self.cache.copy_blocks(schedule.copies)
        step = PackedStep.of(schedule)
        plan = self._backend.plan(self.cache, step.chunks)
        logits = self._run(step.tokens, step.positions, step.kept, plan)
        return ForwardResult(logits, step.told(plan.finite()))

    def _run(self, tokens: list[int], positions: list[int], rows: list[int], plan: StepPlan) -> Tensor:
        # A product with one row may take another path in a library than the same row among others.
        padding = self._bystanders or [0] * (self._fewest - len(tokens))
        device = self._model.device
        kept = rows + [0] * (self._fewest - len(rows))
        with attention_through(plan), self._functions():
            logits = self._logits(
                plan,
                torch.tensor([tokens + [0] * len(padding)], dtype=torch.int64, device=device),
                torch.tensor([positions + padding], dtype=torch.int64, device=device),
                torch.tensor(kept, dtype=torch.int64, device=device),
            )
        return logits[0, : len(rows)].to(torch.float32)

    def _logits(self, plan: StepPlan, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Call the model: `[1, n, vocab]` for `tokens` and `positions` `[1, T]`, of `rows [n]`, all int64."""
        logits: Tensor = self._model(tokens, rows, position_ids=positions, **self._keywords).logits
        return logits

    def forget(self, sequence: Any) -> None:
        """Do nothing: the pool owns the blocks."""

    def release_memory(self, *, again: bool = False) -> bool:
        self._backend.release_memory()
        return False


class FallbackRunner:
    """Computes each sequence alone, with transformers' own cache: for architectures that cannot be packed.

    Needs a scheduler with `whole_prompts`: then a sequence's passes are always the same, one for the prompt and one per
    token, and no other sequence can change its bits.
    """

    lookahead = None

    def __init__(self, model: nn.Module, backend: Backend, vocab_size: int, *, positions: bool = True) -> None:
        """Serve a model. `positions`: pass `position_ids` if the model takes them; the self-test decides.

        Raises:
            NotUnderstood: the model takes no cache, so it cannot continue a sequence.
        """
        self._model = _Model(model)
        self._backend = backend
        self.vocab_size = vocab_size
        self._caches: dict[Any, Any] = {}
        name = cache_name(model)
        if name is None:
            raise NotUnderstood(f"{type(model).__name__} takes no cache ({', '.join(CACHE_NAMES)})")
        self._cache_name = name
        self._takes_positions = positions and "position_ids" in inspect.signature(model.forward).parameters
        self._dynamic = rotary.dynamic(model)

    @torch.inference_mode()
    def forward(self, schedule: Schedule) -> ForwardResult:
        """Run one pass for each chunk. A pass that fails is an error of its chunk alone, because nothing is shared."""
        rows: list[Tensor] = []
        errors: dict[int, ReplyFault] = {}
        for number, chunk in enumerate(schedule.chunks):
            try:
                rows.append(self._pass(chunk))
            except Exception as error:  # an architecture may raise anything for a text that it cannot take
                if out_of_memory(error):
                    raise
                log.exception("a fault in computing a reply")
                errors[number] = ReplyFault(f"the model failed on this request: {error}")
                rows.append(torch.zeros(chunk.num_rows, self.vocab_size, dtype=torch.float32))
        device = self._model.device
        # A fault shows in the sequence's own logits: there are no keys that another could read.
        finite = (True,) * len(rows)
        return ForwardResult(torch.cat([part.to(device) for part in rows]), lambda: finite, errors)

    def _pass(self, chunk: Chunk) -> Tensor:
        """Compute a chunk. Returns the logits of its last tokens, `[num_rows, vocab] float32`."""
        sequence, start, end, rows = chunk.sequence, chunk.start, chunk.start + chunk.count, chunk.num_rows
        device = self._model.device
        if self._dynamic:
            rotary.reset(self._model.model)
        arguments: dict[str, Any] = {self._cache_name: self._caches.get(sequence)}
        if self._takes_positions:
            arguments["position_ids"] = torch.arange(start, end, device=device)[None]
        tokens = torch.tensor([sequence.tokens(start, end)], dtype=torch.int64, device=device)
        last = torch.arange(end - start - max(rows, 1), end - start, device=device)
        output = self._model(tokens, last, use_cache=True, **arguments)
        names = (self._cache_name, *CACHE_NAMES)
        cache = next((found for name in names if (found := getattr(output, name, None)) is not None), None)
        if cache is None:
            raise NotUnderstood("it returns no cache: it cannot generate token by token")
        self._caches[sequence] = cache
        logits: Tensor = output.logits[0, output.logits.shape[1] - rows :]
        return logits.to(torch.float32)

    def forget(self, sequence: Any) -> None:
        self._caches.pop(sequence, None)

    def release_memory(self, *, again: bool = False) -> bool:
        self._backend.release_memory()
        return False

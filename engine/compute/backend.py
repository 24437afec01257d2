"""The interface between device-neutral code and the code for one kind of device. Knows no kernel and no request.

A `Backend` allocates the cache, plans each step, replaces modules of a model by its own, and names what the bits of a
reply depend on. `engine.compute.cpu.backend` computes with compiled kernels, `engine.compute.torch_backend` with
torch's own operations. `engine.loading.placement` chooses one for a model; no other code asks which one it is.

          Runner ── plan(cache, chunks) ──► StepPlan ◄── attend(layer, …) ── attention_forward ◄── a model's layer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from engine.compute.kv_cache import KVCache, LayerShape
from engine.compute.linear import Make
from engine.scheduling.block_pool import BLOCK_SIZE

if TYPE_CHECKING:
    from engine.compute.model_runner import Runner

Progress = Callable[[str], None]
"""Called with a few words about what is taking long."""


@dataclass(frozen=True, slots=True)
class PackedChunk:
    """A chunk in a packed step: rows `row … row + count - 1` hold a sequence's tokens `start … start + count - 1`."""

    row: int
    count: int
    start: int
    table: tuple[int, ...]
    """Blocks of tokens `0 … start + count - 1`."""
    adapter: str = ""
    """The adapter that computes the rows; empty: none, the model alone."""

    def slots(self) -> list[int]:
        """List where each row's key and value are stored."""
        table, end = self.table, self.start + self.count
        return [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(self.start, end)]


def rows_by_adapter(chunks: Sequence[PackedChunk]) -> dict[str, Tensor]:
    """Return the numbers of each adapter's rows, `[n] int64`; rows without an adapter are in none."""
    rows: dict[str, list[int]] = {}
    for chunk in chunks:
        if chunk.adapter:
            rows.setdefault(chunk.adapter, []).extend(range(chunk.row, chunk.row + chunk.count))
    return {adapter: torch.tensor(numbers, dtype=torch.int64) for adapter, numbers in rows.items()}


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSettings:
    """A layer's query heads, and how it computes scores.

    Attributes:
        heads: of the queries; scale: of the scores; softcap: their bound; sinks: `[heads]`.
    """

    heads: int
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def kind(self) -> tuple[int, float, float | None, bool]:
        """A value that is equal for layers that differ only in the numbers of their sinks."""
        return self.heads, self.scale, self.softcap, self.sinks is not None


@dataclass(frozen=True, slots=True)
class StepSize:
    """How large the steps of a runner may be.

    Attributes:
        rows: tokens of a step; sequences: chunks of a step; length: tokens of a sequence.
    """

    rows: int
    sequences: int
    length: int


class StepPlan(Protocol):
    """One step's attention and adapters: made once per step and used by every layer."""

    @property
    def adapter_rows(self) -> Mapping[str, Tensor]:
        """Which rows an adapter computes, by its name: see `rows_by_adapter`. Empty in a step without."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Store the step's keys and values in a layer's cache, then attend: each sequence over its own keys alone.

        Args:
            query: `[heads, T, key_dim]`; key and value `[kv_heads, T, dim]`, position-encoded. Rows after
                those of the chunks are padding; their result means nothing.

        Returns:
            `[T, heads, value_dim]`.
        """

    def finite(self) -> Tensor:
        """Return `[rows] bool`, once all layers have attended: False where a key or value was not finite.

        On the device that computed them, so that nothing waits for it here.

        Such a row's keys and values are stored as zeros.
        """


class Backend(Protocol):
    """Computes a model's layers and attention on one kind of device."""

    @property
    def linear(self) -> str:
        """What computes the linear layers: a value of `ModelInfo.linear`."""

    @property
    def breaks_law(self) -> str | None:
        """Why the law cannot be promised here, even if every trial passes; None where it can.

        Trials can only find faults. The law is promised where every operation is known to treat each row by itself.
        """

    @property
    def exact_linear(self) -> Make | None:
        """What makes linear layers that round no weight and whose rows are independent, for adapters; None: nothing."""

    def allocate(self, layers: Sequence[LayerShape], num_blocks: int) -> KVCache:
        """Allocate a cache of `num_blocks` blocks, all zeros."""

    def plan(self, cache: KVCache, chunks: Sequence[PackedChunk]) -> StepPlan:
        """Plan a step over a cache that this backend allocated; the chunks' rows follow each other from row 0 on."""

    def runner(
        self,
        model: nn.Module,
        cache: KVCache,
        vocab_size: int,
        size: StepSize,
        *,
        single_rows: bool = False,
        row_safe: bool = False,
        skips_masks: bool = False,
        bystanders: Sequence[int] = (),
        serves: bool = False,
    ) -> Runner:
        """Make what computes a model's steps over a cache that this backend allocated.

        Args:
            serves: it will serve, so preparations that take long are worth it; else it is for a trial.
            single_rows, row_safe, skips_masks, bystanders: see `engine.compute.model_runner.PackedRunner`.
        """

    def fuse(self, model: nn.Module, *, stored: torch.dtype, length: int, progress: Progress) -> None:
        """Replace linear layers, pointwise modules and decoder layers by the backend's own, in place.

        Args:
            stored: the checkpoint's dtype; numbers may be kept in it where that loses nothing.
            length: how many tokens a sequence may have.
        """

    def release_memory(self) -> None:
        """Give freed memory back to the device and the operating system."""

    def describe(self) -> Mapping[str, str]:
        """Return what the bits depend on, as named parts of the fingerprint: linear layers, hardware.

        Versions of kernels are in `engine.types.versions`.
        """

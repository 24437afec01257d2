"""Facts about a loaded model, and counters of the engine that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ModelNotFound
from engine.types.fingerprint_parts import Parts
from engine.types.gpu import GpuReport
from engine.types.model_manifest import ModelManifest


@dataclass(frozen=True, slots=True)
class ReproducibilityReport:
    """Whether the law holds for a loaded model on this machine, as its self-test found."""

    holds: bool
    reason: str
    """Why the law holds or does not, in one sentence."""
    checks: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts about a loaded model."""

    id: str
    created: int
    """Unix seconds of the checkpoint's newest file: a property of the model, not of this process."""
    architecture: str
    runner: Literal["packed", "fallback"]
    device: str
    dtype: str
    context_length: int
    cache_tokens: int
    max_sequences: int
    max_requests: int
    """Requests that may run and wait at once."""
    vocab_size: int
    system_fingerprint: str
    """The digest of `fingerprint_parts`."""
    law: ReproducibilityReport
    default_sampling: Mapping[str, Any]
    weight_bytes: int
    linear: str = "torch"
    """What computes the linear layers: `native` (compiled here), `native int8`, `packed`, `strict` or `torch`."""
    memory: str = ""
    """What the GPU's memory was taken by once the model was loaded, in one line; empty on a CPU."""
    reasoning: tuple[str, str] | None = None
    """The delimiters before and after the model's thoughts; None if its template has none."""
    tool_calls: str = ""
    """How the model writes a tool call, as far as it is known."""
    tool_calls_source: str = "generic"
    """Where this was learnt: `models.yaml`, `tokenizer`, `chat template`, `table (NAME)`, or `generic`: the template
    knows no tools, and a system message explains them."""
    fingerprint_parts: Parts = field(default_factory=dict)
    """What the bits of a reply depend on beside a request that leaves nothing out, by name."""
    defaults_fingerprint: str = ""
    """The digest of `default_parts`."""
    default_parts: Parts = field(default_factory=dict)
    """What the entry adds to a request that leaves fields out, and the limits that it is held to, by name."""
    manifest: ModelManifest = field(default_factory=lambda: ModelManifest(""))
    """The files of the checkpoint that were read, and their digests."""
    gpu: GpuReport | None = None
    """How a GPU computes the model, and why not in a faster way; None on a CPU."""
    parent: str | None = None
    """Of a model with an adapter that is served beside its base: the base's id."""
    merged_adapter: str | None = None
    """The name of the adapter that was merged into the weights."""
    adapters: Mapping[str, ModelInfo] = field(default_factory=dict)
    """The adapters that are served beside the model, by name: each as a model of its own, `ID:NAME`."""

    def with_adapter(self, name: str) -> ModelInfo:
        """Return the facts about the model with one of its adapters; with none, for an empty name.

        Raises:
            ModelNotFound: there is no such adapter.
        """
        if not name:
            return self
        if name not in self.adapters:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise ModelNotFound(f"{self.id} has no adapter {name!r:.200}; there is: {known}.", param="model")
        return self.adapters[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """What a client needs to know of a model's tokenizer. The tokens are names (`<|im_end|>`); None: there is none."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: int
    adds_special_tokens: bool
    """Whether the tokenizer puts tokens of its own around a text."""
    chat_template: str | None
    fill_in_the_middle: bool
    """Whether it has tokens for a prompt with a `suffix`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine's state and counters, cheap enough for every scrape."""

    alive: bool
    stalled: bool
    """True when there is work and no step has ended for longer than the stall limit."""
    waiting: int
    running: int
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    blocks_total: int
    blocks_free: int
    drafted_tokens: int = 0
    """Draft tokens computed; `accepted_tokens` of them were kept."""
    accepted_tokens: int = 0
    process_id: int | None = None
    """Of the process that computes the model; None: the one that asks (`isolation: thread`), or it has ended."""
    resident_bytes: int = 0
    """What that process has in memory, shared libraries included; 0 where it is none of its own, whose share of the
    asker's memory nobody can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far a load is.

    Attributes:
        text: what is being done, for people.
        bytes_read: of the checkpoint's files, how many bytes were read and hashed.
        total_bytes: how many they have; 0 while it is not known.
    """

    text: str
    bytes_read: int = 0
    total_bytes: int = 0

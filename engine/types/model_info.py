"""What is known of a loaded model, and of the engine that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ReproducibilityReport:
    """What the load-time self-test found: do the bits of a reply depend on the request alone, here?"""

    holds: bool
    reason: str
    """One sentence; why not, if not."""
    checks: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known of a loaded model."""

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
    vocab_size: int
    system_fingerprint: str
    law: ReproducibilityReport
    default_sampling: Mapping[str, Any]
    weight_bytes: int
    linear: str = "torch"
    """What computes the linear layers: `native` (compiled here), `native int8`, `packed`, `strict` or `torch`."""
    reasoning: tuple[str, str] | None = None
    """What stands before and after the model's thoughts; None if its template knows of none."""
    tool_calls: str = ""
    """How the model is taken to write a tool call."""
    tool_calls_source: str = "generic"
    """Where that was learnt: `models.yaml`, `tokenizer`, `chat template`, `table (NAME)`, or `generic`: the template
    knows no tools, and they are explained in a system turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot, cheap enough to be asked for at every scrape."""

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

"""Describe a loaded model: its fingerprint and everything else in `ModelInfo`. Loads and computes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.json_files import read_json
from engine.compute.backend import Backend
from engine.config import ModelConfig
from engine.errors import VerbatimError
from engine.loading import fingerprint
from engine.loading.cache_size import CacheSize
from engine.loading.placement import Placement
from engine.loading.selftest import SelfTest
from engine.loading.text_side import TextSide
from engine.types.model_info import ModelInfo
from engine.types.sampling_params import SamplingParams

_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

log = logging.getLogger("verbatim.engine")


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A model that is prepared for serving and tested, without its text side.

    Attributes:
        weights: SHA-256 of the files; longrope: which rotary frequencies were pinned, if it has two sets.
    """

    model: nn.Module
    backend: Backend
    placement: Placement
    test: SelfTest
    vocab_size: int
    context_length: int
    longrope: str | None
    weights: str

    @property
    def runner(self) -> Literal["packed", "fallback"]:
        return "fallback" if self.test.layers is None else "packed"


def describe(config: ModelConfig, found: Checkpoint, ready: ReadyModel, text: TextSide, size: CacheSize) -> ModelInfo:
    """Gather everything in `ModelInfo`, the fingerprint included."""
    reasoning = text.chat_format.reasoning
    defaults = _default_sampling(config, found.folder)
    return ModelInfo(
        id=config.id,
        created=found.created,
        architecture=type(ready.model).__name__,
        runner=ready.runner,
        device=str(ready.placement.device),
        dtype=str(ready.placement.dtype).removeprefix("torch."),
        context_length=size.context_length,
        cache_tokens=size.tokens,
        max_sequences=config.max_sequences,
        max_requests=config.max_sequences + config.max_queue,
        vocab_size=ready.vocab_size,
        system_fingerprint=fingerprint.fingerprint(_parts(config, found, ready, text, defaults)),
        law=ready.test.report,
        default_sampling=defaults,
        weight_bytes=found.stored_bytes,
        linear=ready.backend.linear,
        reasoning=(reasoning.open, reasoning.close) if reasoning else None,
        tool_calls=text.chat_format.describe(),
        tool_calls_source=text.chat_format.source,
    )


def _parts(
    config: ModelConfig, found: Checkpoint, ready: ReadyModel, text: TextSide, defaults: Mapping[str, Any]
) -> dict[str, object]:
    """Name everything that a reply's bits depend on beside the request: the parts of the fingerprint."""
    template = text.template
    return {
        "weights": ready.weights,
        "tokenizer": fingerprint.tokenizer_digest(text.tokenizer),
        "template": template.source,
        **({"tool template": template.tool_use.source} if template.tool_use else {}),
        "config": found.config,
        "dtype": str(ready.placement.dtype),
        "runner": ready.runner,
        "longrope": ready.longrope,
        # They fill in the fields that a request leaves out.
        "defaults": defaults,
        "end_ids": text.end_ids,
        "template_clock": config.template_clock,
        "content": config.content_special_tokens,
        "threads": None if ready.test.report.holds else torch.get_num_threads(),
        **ready.backend.describe(),
    }


def _default_sampling(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Return the values of fields that requests leave out: the entry's own, else the checkpoint's generation config."""
    path = folder / "generation_config.json"
    given = read_json(path, config.id) if path.exists() else {}
    if given.get("do_sample") is False:
        given = {}
    defaults = {name: given[name] for name in _GENERATION_FIELDS if given.get(name) is not None}
    try:
        SamplingParams.merged(defaults)
    except VerbatimError as error:
        log.warning("%s: generation_config.json is ignored: %s", config.id, error.message)
        defaults = {}
    return {**defaults, **config.sampling}

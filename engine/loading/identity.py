"""Describe a loaded model: the parts of its fingerprint and everything else in `ModelInfo`. Loads nothing."""

from __future__ import annotations

import dataclasses
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
from engine.config import ModelConfig, adapter_id
from engine.devices.gpu import DeviceStream
from engine.errors import VerbatimError
from engine.loading import fingerprint
from engine.loading.adapters import ReadyAdapter
from engine.loading.manifest import manifest_of, remote_code_files
from engine.loading.memory.cache_size import CacheSize
from engine.loading.memory.gpu_budget import GpuBudget
from engine.loading.placement import Placement
from engine.loading.selftest import SelfTest
from engine.loading.text_side import TextSide
from engine.types import versions
from engine.types.fingerprint_parts import Part, digest_of, fingerprint_of, flat
from engine.types.gpu import GpuReport
from engine.types.model_info import ModelInfo
from engine.types.model_manifest import ModelManifest
from engine.types.sampling_params import SAMPLING_FIELDS, SamplingParams

_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

log = logging.getLogger("verbatim.engine")


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A model that is prepared for serving and tested, without its text side.

    Attributes:
        longrope: which rotary frequencies were pinned, if it has two sets.
        digests: SHA-256 of the checkpoint's files.
        gpu: on which rung of the ladder a GPU computes it.
        adapters: those that are merged into its weights or computed beside them.
    """

    model: nn.Module
    backend: Backend
    placement: Placement
    stream: DeviceStream
    budget: GpuBudget
    test: SelfTest
    vocab_size: int
    context_length: int
    longrope: str | None
    digests: Mapping[Path, str]
    gpu: GpuReport | None = None
    adapters: tuple[ReadyAdapter, ...] = ()

    @property
    def runner(self) -> Literal["packed", "fallback"]:
        return "fallback" if self.test.layers is None else "packed"


def describe(
    config: ModelConfig, found: Checkpoint, ready: ReadyModel, text: TextSide, size: CacheSize, memory: str
) -> ModelInfo:
    """Gather everything in `ModelInfo`, the fingerprint included. `memory`: what a GPU's is taken by."""
    reasoning = text.chat_format.reasoning
    defaults = _default_sampling(config, found.folder)
    parts = _computed_parts(config, found, ready, text)
    default_parts = _default_parts(config, defaults, size.context_length)
    manifest = manifest_of(config, found, ready.digests)
    merged = next((one for one in ready.adapters if one.law is None), None)
    if merged is not None:
        parts, manifest = {**parts, **_adapter_parts(merged)}, _with_adapter(manifest, merged)
    info = ModelInfo(
        id=config.id,
        created=found.created,
        architecture=type(ready.model).__name__,
        runner=ready.runner,
        device=str(ready.placement.device),
        gpu=ready.gpu,
        dtype=str(ready.placement.dtype).removeprefix("torch."),
        context_length=size.context_length,
        cache_tokens=size.tokens,
        max_sequences=config.max_sequences,
        max_requests=config.max_sequences + config.max_queue,
        vocab_size=ready.vocab_size,
        system_fingerprint=fingerprint_of(parts, "vb-"),
        law=ready.test.report,
        default_sampling=defaults,
        weight_bytes=found.stored_bytes,
        linear=ready.backend.linear,
        memory=memory,
        reasoning=(reasoning.open, reasoning.close) if reasoning else None,
        tool_calls=text.chat_format.describe(),
        tool_calls_source=text.chat_format.source,
        fingerprint_parts=parts,
        defaults_fingerprint=fingerprint_of(default_parts, "vd-"),
        default_parts=default_parts,
        manifest=manifest,
        merged_adapter=merged.name if merged else None,
    )
    beside = {one.name: _beside(info, one) for one in ready.adapters if one.law is not None}
    return dataclasses.replace(info, adapters=beside)


def _beside(info: ModelInfo, ready: ReadyAdapter) -> ModelInfo:
    """Describe a model with an adapter beside it, as a model of its own."""
    assert ready.law is not None
    parts = {**info.fingerprint_parts, **_adapter_parts(ready)}
    return dataclasses.replace(
        info,
        id=adapter_id(info.id, ready.name),
        parent=info.id,
        law=ready.law,
        system_fingerprint=fingerprint_of(parts, "vb-"),
        fingerprint_parts=parts,
        manifest=_with_adapter(info.manifest, ready),
        weight_bytes=info.weight_bytes + sum(tensor.size for tensor in ready.files.tensors.values()),
        created=max(info.created, *(int(path.stat().st_mtime) for path in ready.files.entry.files)),
    )


def _adapter_parts(ready: ReadyAdapter) -> dict[str, Part]:
    """Name what an adapter adds to the parts: its numbers, what is computed with them, and how."""
    _, weights = ready.files.entry.files
    pairs = ready.adapter.pairs
    return {
        "adapter": f"sha256:{ready.digests[weights]}",
        "adapter_layers": digest_of([[name, pair.rank, pair.scale] for name, pair in sorted(pairs.items())]),
        "adapter_ranks": " ".join(map(str, ready.adapter.ranks)),
        "adapter_mode": "merged" if ready.law is None else "beside",
        "adapter_rules": versions.ADAPTERS_VERSION,
    }


def _with_adapter(manifest: ModelManifest, ready: ReadyAdapter) -> ModelManifest:
    """Add an adapter's files to those of its base, in a folder of their own."""
    files = {f"adapter/{path.name}": digest for path, digest in ready.digests.items()}
    return ModelManifest.of(adapter_id(manifest.name, ready.name), {**dict(manifest.files), **files})


def _computed_parts(config: ModelConfig, found: Checkpoint, ready: ReadyModel, text: TextSide) -> dict[str, Part]:
    """Name everything that a reply depends on beside a complete request: the parts of the fingerprint."""
    template, code = text.template, remote_code_files(config, found)
    names = {path.relative_to(found.folder).as_posix(): ready.digests[path] for path in code}
    return {
        **fingerprint.code_parts(on_cpu=ready.placement.on_cpu),
        **fingerprint.library_parts(_other_libraries(found, ready)),
        **fingerprint.chat_format_parts(text.chat_format),
        **ready.backend.describe(),
        "architecture": type(ready.model).__name__,
        "weights": fingerprint.weights_digest(found.files, ready.digests),
        "config": digest_of(found.config),
        "remote_code": digest_of(names or None),
        "tokenizer": fingerprint.tokenizer_digest(text.tokenizer),
        "template": digest_of(template.source),
        "tool_template": digest_of(template.tool_use.source if template.tool_use else None),
        "content_special_tokens": config.content_special_tokens,
        "end_ids": " ".join(map(str, text.end_ids)),
        "dtype": str(ready.placement.dtype).removeprefix("torch."),
        "runner": ready.runner,
        "longrope": ready.longrope,
        "threads": None if ready.test.report.holds else torch.get_num_threads(),
    }


def _other_libraries(found: Checkpoint, ready: ReadyModel) -> tuple[str, ...]:
    """Name the libraries that only some checkpoints and placements pass through."""
    return (
        *(("gguf",) if found.folder.is_file() else ()),
        *(fingerprint.QUANTISERS if found.config.get("quantization_config") is not None else ()),
        *(() if ready.placement.on_cpu else (fingerprint.GPU_COMPILER,)),
        *(("accelerate",) if isinstance(ready.placement.device_map, str) else ()),  # it moves data between devices
    )


def _default_parts(config: ModelConfig, sampling: Mapping[str, Any], context_length: int) -> dict[str, Part]:
    """Name what fills in the fields that a request leaves out, and the limits that cut a reply short."""
    filled = SamplingParams.merged(sampling)
    return {
        **{name: flat(getattr(filled, name)) for name in SAMPLING_FIELDS},
        "template_clock": config.template_clock.isoformat() if config.template_clock else None,
        "max_completion_tokens": config.max_completion_tokens,
        "context_length": context_length,
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

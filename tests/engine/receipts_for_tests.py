"""A model's facts, a request and its outputs, and the receipt that a recorder makes of them: no engine computes."""

from __future__ import annotations

import datetime as dt
from typing import Any

from engine import (
    ChatMessage,
    ChoiceDelta,
    GenerationRequest,
    ModelInfo,
    PreparedRequest,
    Receipt,
    Recorder,
    ReproducibilityReport,
    RequestOutput,
    SamplingParams,
    Usage,
    fingerprint_of,
    recorded,
)
from engine.types.model_manifest import ModelManifest

PARTS: dict[str, Any] = {"sampler": 1, "prompt_format": 1, "torch": "2.13.0", "transformers": "5.24.0", "threads": None}
FILES = {"config.json": "1" * 64, "model.safetensors": "2" * 64}
NOW = dt.datetime(2026, 11, 26, 12, 30, 15, 250)
PROMPT = (5, 6, 7)
TOKENS = (10, 11, 12, 2)
SCORES = ((-0.5, 1.25), (-1.5, 0.75), (-2.25, 3.5))
"""Of the tokens 10, 11 and 2: the third one was forced."""


def model_info(**changes: Any) -> ModelInfo:
    parts = {**PARTS, **changes.pop("parts", {})}
    facts: dict[str, Any] = {
        "id": "tiny",
        "created": 1,
        "architecture": "Qwen3ForCausalLM",
        "runner": "packed",
        "device": "cpu",
        "dtype": "float32",
        "context_length": 256,
        "cache_tokens": 1024,
        "max_sequences": 4,
        "max_requests": 260,
        "vocab_size": 448,
        "system_fingerprint": fingerprint_of(parts, "vb-"),
        "law": ReproducibilityReport(True, "it holds.", (("batch", True),)),
        "default_sampling": {},
        "weight_bytes": 1,
        "fingerprint_parts": parts,
        "manifest": ModelManifest.of("tiny", {**FILES, **changes.pop("files", {})}),
    }
    return ModelInfo(**{**facts, **changes})


def request_of(**fields: Any) -> GenerationRequest:
    given = {"messages": (ChatMessage("user", "Hello"),), **fields}
    return recorded(GenerationRequest(request_id="r", **given), model_info(), NOW)


def prepared_of(**params: Any) -> PreparedRequest:
    filled = {"seed": 7, "max_tokens": 8, **params}
    return PreparedRequest(request_id="r", prompt_token_ids=PROMPT, params=SamplingParams(**filled), record=True)


def outputs_of(n: int = 1, *, margins: bool = False) -> list[RequestOutput]:
    """Two outputs: the second token of each choice is followed by a forced one."""
    first, second = [], []
    for index in range(n):
        told: Any = [(0.5,), (0.0005, None, 0.25)] if margins else [None, None]
        first.append(ChoiceDelta(index, "", TOKENS[:1], scores=SCORES[:1], margins=told[0]))
        second.append(ChoiceDelta(index, "", TOKENS[1:3], scores=SCORES[1:2], margins=told[1] and told[1][:2]))
        second.append(
            ChoiceDelta(index, "", TOKENS[3:], scores=SCORES[2:], margins=told[1] and told[1][2:], finish_reason="stop")
        )
    return [RequestOutput("r", tuple(first), Usage(3, n)), RequestOutput("r", tuple(second), Usage(3, 4 * n), True)]


def receipt_of(
    *, info: ModelInfo | None = None, text: bool = True, prompt_ids: bool = True, params: Any = None, **fields: Any
) -> Receipt:
    prepared = prepared_of(**(params or {}))
    recorder = Recorder(
        request_of(**fields),
        prepared,
        info or model_info(),
        id="chatcmpl-1",
        created=5,
        text=text,
        prompt_ids=prompt_ids,
    )
    for output in outputs_of(prepared.params.n, margins=prepared.params.margins):
        recorder.add(output)
    return recorder.receipt()

"""Models as the API shows them: the objects of `GET /models`, and the states of `GET /health/ready`."""

from __future__ import annotations

from typing import Any

from engine import ModelStatus, Registry, VerbatimError

__all__ = ["is_ready", "model_details", "model_object", "state_of"]


def model_object(status: ModelStatus) -> dict[str, Any]:
    """Return a model as the OpenAI API lists it, with what the engine knows of it beside.

    Before it is loaded for the first time, that is what the headers of its checkpoint say.
    """
    info, outline = status.info, status.outline
    known = info or outline
    base = {"id": status.id, "object": "model", "created": known.created if known else 0, "owned_by": "local"}
    base |= {"root": status.parent or status.id, "parent": status.parent}  # as vLLM tells adapters from their models
    base |= {"state": status.state, "load": status.load, "memory_bytes": status.memory_bytes}
    if status.state != "ready":
        base["detail"] = status.detail
    if status.state == "loading":
        read = status.progress
        base["progress"] = {"bytes": read.bytes_read, "total_bytes": read.total_bytes} if read else None
    if info is None:
        found = {"architecture": outline.architecture, "weight_bytes": outline.weight_bytes} if outline else {}
        return {**base, **found}
    return {
        **base,
        "architecture": info.architecture,
        "context_length": info.context_length,
        "max_model_len": info.context_length,  # the same, under the name that evaluation harnesses ask for
        "cache_tokens": info.cache_tokens,
        "max_sequences": info.max_sequences,
        "vocab_size": info.vocab_size,
        "weight_bytes": info.weight_bytes,
        "device": info.device,
        "dtype": info.dtype,
        "linear": info.linear,
        "memory": info.memory or None,
        "runner": info.runner,
        "merged_adapter": info.merged_adapter,
        "gpu": {"rung": info.gpu.rung, "reasons": dict(info.gpu.reasons)} if info.gpu else None,
        "system_fingerprint": info.system_fingerprint,
        "defaults_fingerprint": info.defaults_fingerprint,
        "reproducible": {"holds": info.law.holds, "reason": info.law.reason, "checks": dict(info.law.checks)},
        "default_sampling": dict(info.default_sampling),
        "tool_calls": {"form": info.tool_calls, "source": info.tool_calls_source},
        "reasoning": dict(zip(("open", "close"), info.reasoning, strict=True)) if info.reasoning else None,
    }


def model_details(status: ModelStatus) -> dict[str, Any]:
    """Return the same object with the parts that both fingerprints are digests of."""
    info = status.info
    if info is None:
        return model_object(status)
    parts = {"fingerprint_parts": dict(info.fingerprint_parts), "default_parts": dict(info.default_parts)}
    return {**model_object(status), **parts}


def state_of(registry: Registry, status: ModelStatus) -> str:
    """Return `ready`, or why a model is not."""
    if status.state != "ready":
        return f"{status.state}: {status.detail}"
    try:
        stats = registry.get(status.id).stats()
    except VerbatimError as error:
        return f"dead: {error.message}"
    if not stats.alive:
        return "dead: the engine has stopped; see the log"
    if stats.stalled:
        return "stalled: a step has been running for longer than the stall limit"
    return "ready"


def is_ready(status: ModelStatus, state: str) -> bool:
    """Whether a server is ready as far as this model goes: those on demand may be unloaded, and not have failed it.

    Args:
        state: as `state_of` says.
    """
    return state == "ready" or (not status.required and status.state != "ready")

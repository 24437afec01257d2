"""Writes a snapshot as JSON: the same numbers as `/metrics`, for a page or a script that wants a moment's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine import EngineStats, ModelInfo
from server.metrics.facts import Facts
from server.metrics.snapshot import ModelState, Snapshot

__all__ = ["machine_object"]


def machine_object(
    now: Snapshot, facts: Facts, *, may_use: Callable[[str], bool], may_manage: bool, receipts: dict[str, Any]
) -> dict[str, Any]:
    """Return what `GET /machine` answers.

    Args:
        may_use: whether a model exists for who asks. The others are left out.
        may_manage: whether who asks may see what concerns all users.
        receipts: how the receipts do.
    """
    told = {
        "object": "machine",
        "version": now.version,
        "uptime_seconds": round(now.uptime, 3),
        "may_manage": may_manage,
        "machine": {
            "processor": facts.processor,
            "cores": facts.cores,
            "memory_bytes": facts.memory_bytes,
            "free_memory_bytes": facts.free_memory_bytes,
            "gpus": list(facts.gpus),
        },
        "models": [_model(model, now.now) for model in now.models if model.served and may_use(model.id)],
    }
    return {**told, "server": {**_server(now), **receipts}} if may_manage else told


def _model(model: ModelState, now: float) -> dict[str, Any]:
    counts = model.counts
    return {
        "id": model.id,
        "state": model.state,
        "detail": model.detail,
        "memory_bytes": model.memory_bytes,
        **_loaded(model.info),
        **_running(model.stats, model.info),
        "prompt_tokens_per_second": counts.prompt_rate.per_second(now),
        "generation_tokens_per_second": counts.generation_rate.per_second(now),
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "generation_tokens": counts.generation_tokens,
        "replies": dict(counts.outcomes),
        "finish_reasons": dict(counts.reasons),
    }


def _loaded(info: ModelInfo | None) -> dict[str, Any]:
    """What is known of a model once it was loaded; nulls before."""
    if info is None:
        return {"device": None, "system_fingerprint": None, "reproducible": None}
    law = {"holds": info.law.holds, "reason": info.law.reason}
    return {"device": info.device, "system_fingerprint": info.system_fingerprint, "reproducible": law}


def _running(stats: EngineStats | None, info: ModelInfo | None) -> dict[str, Any]:
    """What runs in a model's engine; nulls where there is none."""
    names = ("running", "waiting", "steps", "preemptions", "drafted_tokens", "accepted_tokens")
    if stats is None:
        return {**dict.fromkeys(names), "cache": None}
    used = stats.blocks_total - stats.blocks_free
    cache = {
        "usage": used / stats.blocks_total if stats.blocks_total else 0.0,
        "used_blocks": used,
        "blocks": stats.blocks_total,
        "tokens": None if info is None else info.cache_tokens,
    }
    return {**{name: getattr(stats, name) for name in names}, "cache": cache}


def _server(now: Snapshot) -> dict[str, Any]:
    """What concerns all users."""
    ledger = now.ledger
    return {
        "requests_active": now.active,
        "requests": sum(now.requests.values()),
        "refusals": [
            {"status": status, "code": code, "count": count} for (status, code), count in sorted(now.refusals.items())
        ],
        "connections": now.connections,
        "max_connections": now.max_connections,
        "body_bytes": now.body_bytes,
        "max_body_bytes": now.max_body_bytes,
        "ledger": None
        if ledger is None
        else {
            "usable": ledger.usable,
            "faults": ledger.faults,
            "settlements_waiting": ledger.waiting,
            "settlements_set_aside": ledger.aside,
        },
    }

"""Read this machine's processor from `/proc/cpuinfo`. Knows no torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

__all__ = ["processor_fields", "processor_model"]

_MODEL_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size")


def processor_fields() -> Mapping[str, str]:
    """Return the fields of the first processor, by name; empty where the system has no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def processor_model() -> str:
    """Return vendor, family, model, stepping and cache size in one line.

    Libraries choose tile sizes by the cache size, so the instruction set alone does not determine the bits.
    """
    fields = processor_fields()
    if not fields:
        return platform.processor() or platform.machine()
    return "/".join(fields.get(name, "") for name in _MODEL_FIELDS) or platform.machine()

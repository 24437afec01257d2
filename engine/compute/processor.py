"""Read this machine's processor from `/proc/cpuinfo`. Knows no torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["ARM", "processor_model", "processor_name", "processor_target"]

ARM: Final = frozenset({"aarch64", "arm64"})
"""What Linux and macOS call a processor of ARM with 64 bits (`platform.machine()`)."""

_MODEL_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size")
_ARM_FIELDS = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision")


def _fields() -> Mapping[str, str]:
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
    return _joined(_MODEL_FIELDS, _ARM_FIELDS)


def processor_name() -> str:
    """Return the model's name alone, for people."""
    return _joined(("model name",), ("Hardware",))


def processor_target() -> str:
    """Return in one line what `-march=native` depends on: the model and its instruction sets."""
    return _joined(("model name", "flags"), (*_ARM_FIELDS, "Features"))


def _joined(*alternatives: tuple[str, ...]) -> str:
    """Join the first fields of which the system tells any; without such a file, what the platform is called."""
    fields = _fields()
    for names in alternatives:
        if any(fields.get(name) for name in names):
            return "/".join(fields.get(name, "") for name in names)
    return platform.processor() or platform.machine()

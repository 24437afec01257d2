"""Kernels on processors of ARM: where they are had, and how they are compiled.

That they have the same bits is tested with all other instruction sets (the fixture `other_kernels`).
"""

from __future__ import annotations

import platform

import pytest
import torch

from engine.compute.cpu import kernel_file, kernels
from engine.compute.cpu.kernels import NoKernels

GCC, CLANG = "gcc (Debian 12.2.0-14) 12.2.0", "Apple clang version 16.0.0"


@pytest.mark.parametrize(
    ("system", "machine", "version", "flag"),
    [
        ("Linux", "x86_64", GCC, "-march=native"),
        ("Linux", "x86_64", CLANG, "-march=native"),
        ("Linux", "aarch64", GCC, "-march=native"),
        ("Linux", "aarch64", CLANG, "-mcpu=native"),
        ("Darwin", "arm64", CLANG, "-mcpu=native"),
    ],
)
def test_each_compiler_is_asked_for_this_processor_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, version: str, flag: str
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert kernel_file._native(version) == flag


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
@pytest.mark.parametrize("capability", ["DEFAULT", "SVE256"])
def test_torchs_names_for_arm_forbid_nothing(monkeypatch: pytest.MonkeyPatch, machine: str, capability: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert kernels._instructions() == ()


def test_other_processors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(NoKernels, match="on riscv64 processors yet"):
        kernels._instructions()

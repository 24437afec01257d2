"""The processor, as it is named in the fingerprint and in the name of the compiled kernels' file."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from engine.compute.processor import processor_model, processor_target

INTEL = "processor: 0\nvendor_id: GenuineIntel\nmodel name: Xeon\ncache size: 33 MB\nflags: avx2 fma\n\nprocessor: 1\n"
ARM = "processor: 0\nFeatures: fp asimd\nCPU implementer: 0x41\nCPU part: 0xd40\nCPU revision: 1\n\nprocessor: 1\n"


def told(monkeypatch: pytest.MonkeyPatch, text: str | None) -> tuple[str, str]:
    def read(path: Path, *_: object, **__: object) -> str:
        if text is None:
            raise OSError("no such file")
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: "some processor")
    return processor_model(), processor_target()


@pytest.mark.parametrize(
    ("text", "model", "target"),
    [
        (INTEL, "GenuineIntel///Xeon//33 MB", "Xeon/avx2 fma"),
        (ARM, "0x41///0xd40/1", "0x41///0xd40/1/fp asimd"),
        ("processor: 0\n", "some processor", "some processor"),
        (None, "some processor", "some processor"),
    ],
    ids=["x86", "ARM", "neither", "no file"],
)
def test_a_processor_is_told_from_others(
    monkeypatch: pytest.MonkeyPatch, text: str | None, model: str, target: str
) -> None:
    assert told(monkeypatch, text) == (model, target)


def test_two_processors_of_arm_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits may differ between them, and so must fingerprint and compiled file."""
    one, other = told(monkeypatch, ARM), told(monkeypatch, ARM.replace("0xd40", "0xd0c"))
    assert one[0] != other[0]
    assert one[1] != other[1]

"""Where a model is computed, and in which dtype: by the entry, the checkpoint and the kind of GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpus_for_tests import GIB, FakeGpu

from engine import LoadError, ModelConfig, NotEnoughMemory
from engine.checkpoints import checkpoint
from engine.checkpoints.checkpoint import Checkpoint
from engine.devices import gpu
from engine.loading import placement
from engine.loading.placement import Placement, place


@pytest.fixture
def found(tiny: Callable[[str], Path]) -> Checkpoint:
    return checkpoint.inspect(tiny("qwen3"), "m")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[FakeGpu]:
    """A machine with two GPUs: the first is small."""
    there = [FakeGpu(torch.device("cuda:0"), size=4 * GIB), FakeGpu(torch.device("cuda:1"), size=24 * GIB)]
    monkeypatch.setattr(gpu, "count", lambda: len(there))
    monkeypatch.setattr(gpu, "computes_bfloat16", lambda device: True)

    class Memory:
        def __new__(cls, device: torch.device) -> Any:
            return there[device.index]

        @classmethod
        def of_all(cls) -> tuple[FakeGpu, ...]:
            return tuple(there)

    monkeypatch.setattr(placement, "DeviceMemory", Memory)
    return there


def _entry(**fields: Any) -> ModelConfig:
    return ModelConfig(**{"id": "m", "path": Path("/nowhere"), **fields})


def _place(found: Checkpoint, *, parameters: int = 0, **fields: Any) -> Placement:
    return place(_entry(**fields), replace(found, parameters=parameters) if parameters else found)


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "auto"])
def test_another_gpus_memory_is_not_the_chosen_ones(gpus: list[FakeGpu], found: Checkpoint, device: str) -> None:
    with pytest.raises(NotEnoughMemory, match=r"need 18\.6 GiB of GPU memory as bfloat16, 4\.0 GiB are free") as caught:
        _place(found, parameters=10_000_000_000, device=device)
    assert caught.value.details["free"] == 4 * GIB


def test_what_fits_the_chosen_gpu_is_placed_there(gpus: list[FakeGpu], found: Checkpoint) -> None:
    chosen = _place(found, parameters=10_000_000_000, device="cuda:1")
    assert (chosen.device, chosen.gpus) == (torch.device("cuda:1"), (gpus[1],))
    gpus[1].others = 20 * GIB
    with pytest.raises(NotEnoughMemory, match=r"4\.0 GiB are free"):
        _place(found, parameters=10_000_000_000, device="cuda:1")


def test_a_map_over_all_gpus_may_use_them_all(gpus: list[FakeGpu], found: Checkpoint) -> None:
    spread = _place(found, parameters=14_000_000_000, device="balanced")
    assert spread.gpus == tuple(gpus)
    with pytest.raises(NotEnoughMemory, match=r"28\.0 GiB are free"):
        _place(found, parameters=20_000_000_000, device="balanced")


def test_on_a_cpu_there_is_no_gpu_to_divide(gpus: list[FakeGpu], found: Checkpoint) -> None:
    assert _place(found, device="cpu").gpus == ()


def test_a_gpu_that_is_not_there_is_named(gpus: list[FakeGpu], found: Checkpoint) -> None:
    with pytest.raises(LoadError, match=r"there is no cuda:2; this machine has 2 GPU"):
        _place(found, device="cuda:2")


DTYPES: dict[str, tuple[str, bool, float, str, torch.dtype, str]] = {
    "as the checkpoint": ("bfloat16", True, 0.5, "auto", torch.bfloat16, ""),
    "float16 stays": ("float16", True, 0.5, "auto", torch.float16, ""),
    "float16 stays on an old GPU": ("float16", False, 0.5, "auto", torch.float16, ""),
    "small float32 stays": ("float32", True, 0.5, "auto", torch.float32, ""),
    "large float32": ("float32", True, 3.0, "auto", torch.bfloat16, r"float32 checkpoint of 3\.0 billion .*bfloat16"),
    "large float32 if asked for": ("float32", True, 3.0, "float32", torch.float32, ""),
    "large float32 on an old GPU": ("float32", False, 3.0, "auto", torch.float16, "no instructions for bfloat16"),
    "bfloat16 on an old GPU": (
        "bfloat16",
        False,
        0.5,
        "auto",
        torch.float16,
        r"float16, whose largest number is 65504",
    ),
    "emulated if asked for": ("bfloat16", False, 0.5, "bfloat16", torch.bfloat16, "it is slow there"),
    "float32 on an old GPU if asked for": ("bfloat16", False, 0.5, "float32", torch.float32, ""),
}


@pytest.mark.parametrize("case", DTYPES)
def test_the_dtype_on_a_gpu(
    case: str,
    gpus: list[FakeGpu],
    found: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored, native, billions, asked, dtype, warns = DTYPES[case]
    monkeypatch.setattr(gpu, "computes_bfloat16", lambda device: native)
    one = replace(found, dtype=stored, parameters=int(billions * 1e9))
    chosen = place(_entry(device="cuda:1", dtype=asked), one)
    assert chosen.dtype == dtype
    assert len(caplog.records) == (0 if not warns else 2 if "large float32 on an old" in case else 1)
    if warns:
        assert re.search(warns, caplog.text)


def test_on_a_cpu_the_dtype_is_float32_whatever_the_size(found: Checkpoint) -> None:
    assert place(_entry(device="cpu"), replace(found, dtype="bfloat16", parameters=1000)).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"quantization": "int4", "device": "cpu", "dtype": "bfloat16"},
            r"int4 is for float32 on a CPU, or for one GPU, not torch\.bfloat16 on cpu",
        ),
        (
            {"quantization": "int8", "device": "balanced"},
            r"int8 is for float32 on a CPU, or for one GPU, not torch\.bfloat16 on cuda:0",
        ),
        ({"quantization": "int4", "device": "balanced"}, r"int4 is for float32 on a CPU, or for one GPU"),
    ],
)
def test_a_quantisation_that_no_backend_has_is_refused_before_a_weight_is_read(
    gpus: list[FakeGpu], found: Checkpoint, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(LoadError, match=says):
        _place(found, **fields)


def test_what_a_backend_has_is_accepted(gpus: list[FakeGpu], found: Checkpoint) -> None:
    for kind in ("int8", "int4", "none"):
        assert _place(found, device="cpu", quantization=kind).rounds == (None if kind == "none" else kind)
    for kind in ("int4", "int8"):
        assert _place(found, device="cuda:1", quantization=kind).on_one_gpu


def test_a_quantised_checkpoint_stays_packed_on_one_gpu_or_a_cpu(gpus: list[FakeGpu], found: Checkpoint) -> None:
    packed = replace(found, config={**found.config, "quantization_config": {"quant_method": "awq", "bits": 4}})
    assert _place(packed, device="cuda:0").packs
    assert not _place(found, device="cuda:0").packs
    on_cpu = [_place(packed, device="cpu", quantization=kind) for kind in (None, "none")]
    assert [(one.packs, one.reads, one.rounds) for one in on_cpu] == [(False, True, "stored"), (False, True, None)]
    assert not _place(found, device="cpu").reads
    for fields in ({"device": "balanced"}, {"device": "cuda", "gpu": "no-kernels"}):
        with pytest.raises(LoadError, match=r"the checkpoint is quantised \(awq\), and cannot be loaded here"):
            _place(packed, **fields)

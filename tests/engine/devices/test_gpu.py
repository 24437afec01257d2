"""A thread that computes a model has its device and its stream; what the bits on a GPU depend on is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import LLM, Engine
from engine.checkpoints.checkpoint import prepare_environment
from engine.devices import gpu
from engine.devices.gpu import DeviceMemory, DeviceStream
from engine.loading import loader
from engine.serving.async_engine import AsyncEngine

CARD = torch.device("cuda:1")


class _Cuda:
    """torch.cuda, as far as devices and streams go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.stream_now, self.waits = 0, "default", 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "device", self._on)
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.cuda, "synchronize", self._wait)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    @contextmanager
    def _stream(self, stream: str) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream
        yield
        self.stream_now = before

    def _wait(self, device: torch.device) -> None:
        self.waits += 1


def test_a_stream_makes_its_device_current_and_gives_the_thread_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(monkeypatch)
    stream = DeviceStream(CARD)
    with stream.current():
        assert (cuda.device, cuda.stream_now) == (1, "stream of cuda:1")
        stream.wait_for_all()
    assert (cuda.device, cuda.stream_now, cuda.waits) == (0, "default", 1)


def test_a_cpu_has_no_stream() -> None:
    stream = DeviceStream(torch.device("cpu"))
    with stream.current():
        stream.wait_for_all()
    assert not torch.cuda.is_initialized()


class _Noted(DeviceStream):
    """A stream on the CPU that knows whether it is current."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"))
        self.depth = self.waits = 0

    @contextmanager
    def current(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def wait_for_all(self) -> None:
        self.waits += 1


def test_everything_that_computes_does_so_on_the_models_stream(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, making the sampler, and each step, whatever thread takes it: a script's own or the server's."""
    streams: list[_Noted] = []
    seen: list[tuple[str, bool]] = []

    def made(device: torch.device) -> _Noted:
        streams.append(_Noted(device))
        return streams[-1]

    def watch(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, bool(streams) and streams[0].depth > 0))
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    monkeypatch.setattr(loader, "DeviceStream", made)
    for name in ("load_model", "self_test", "_fit"):
        watch(loader, name)
    monkeypatch.setattr("engine.engine.Sampler", _watched_class(seen, streams))
    watch(Engine, "_forward")
    watch(Engine, "_commit")
    llm = LLM(tiny("qwen3"), cache_size="8MiB")
    llm.generate("Hello", max_tokens=2)
    served = AsyncEngine(llm.engine)
    served.close()
    assert len(streams) == 1
    assert streams[0].waits == 1, "weights are there before they are used"
    assert {name for name, _ in seen} == {"load_model", "self_test", "_fit", "Sampler", "_forward", "_commit"}
    assert all(current for _, current in seen), seen
    assert streams[0].depth == 0


def _watched_class(seen: list[tuple[str, bool]], streams: list[_Noted]) -> Any:
    from engine.sampling.sampler import Sampler

    def make(*args: Any) -> Sampler:
        seen.append(("Sampler", streams[0].depth > 0))
        assert args[-1] == torch.device("cpu")
        return Sampler(*args)

    return make


# -- what the bits depend on ------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="ieee"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def test_a_gpu_is_described_by_what_changes_a_sum(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"gpu": "Card 1", "capability": "8.9", "cuda": "13.0", "cublas": ":4096:8", "tf32": "convolutions"}
    assert gpu.properties(CARD) == known
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert gpu.matmul_tf32()
    assert gpu.properties(CARD) == {**known, "tf32": "products convolutions"}


_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.slow
def test_torch_reads_the_allocators_settings_after_they_are_set() -> None:
    """torch is imported before the environment is prepared, and reads this variable when it first allocates."""
    code = (
        "from engine.checkpoints.checkpoint import prepare_environment as p; p(pull=False); import torch, os;"
        "print(torch._C._accelerator_getAllocatorSettings(), os.environ['CUBLAS_WORKSPACE_CONFIG'], sep='|')"
    )
    clean = {name: value for name, value in os.environ.items() if name not in _NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=clean
    )
    assert done.stdout.strip() == "expandable_segments:True|:4096:8"


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, ("expandable_segments:True", None, ":4096:8")),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ("max_split_size_mb:64", None, ":4096:8")),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, (None, "max_split_size_mb:64", ":4096:8")),
        ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ("expandable_segments:True", None, ":16:8")),
    ],
)
def test_what_the_user_has_set_stays(
    given: dict[str, str], then: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older name of the allocator's settings, too, which torch reads first."""
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare_environment(pull=False)
    assert tuple(os.environ.get(name) for name in _NAMES) == then


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_real_gpus_memory_is_counted() -> None:
    memory, size = DeviceMemory(torch.device("cuda:0")), 64 * 2**20
    memory.release()
    held, free = memory.held(), memory.free()
    assert 0 < free <= memory.total()
    memory.forget_peak()
    tensor = torch.zeros(size, dtype=torch.uint8, device=memory.device)
    assert memory.allocated() >= size
    assert memory.peak() >= held + size
    del tensor
    memory.release()
    assert memory.held() == held
    assert abs(memory.free() - free) < size


@pytest.mark.gpu
def test_a_real_gpus_stream_is_the_threads_own_inside_the_block() -> None:
    device = torch.device("cuda", gpu.count() - 1)
    stream, before = DeviceStream(device), torch.cuda.current_stream(device)
    with stream.current():
        assert torch.cuda.current_device() == device.index
        assert torch.cuda.current_stream() != before
    assert torch.cuda.current_stream(device) == before


@pytest.mark.gpu
def test_a_model_on_a_gpu_says_what_its_memory_is_for(tiny: Callable[[str], Path]) -> None:
    llm = LLM(tiny("qwen3"), device="cuda", cache_size="64MiB")
    assert re.fullmatch(r"\d+\.\d GiB: weights 0\.0, cache 0\.\d \([\d,]+ tokens\), .*free \d+\.\d", llm.info.memory)
    assert set(gpu.properties(torch.device("cuda:0"))) <= llm.info.fingerprint_parts.keys()
    assert "triton" in llm.info.fingerprint_parts
    assert len(llm.generate("Hello", max_tokens=4, ignore_eos=True)[0].token_ids) == 4
    assert set(dict(llm.info.law.checks)) == {"packed", "chunked", "key spans"}

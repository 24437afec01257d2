"""Whole starts as on one GPU: from an entry to a served model, by the reference of the kernels on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from checkpoints.test_packed_layers import quantise
from gpus_for_tests import FakeGpu
from on_reference import ReferenceBackend

from engine import LLM, LoadError
from engine.loading import loader
from engine.loading.gpu import probe
from engine.loading.placement import Placement
from engine.types.gpu import GpuCheck, GpuReport, GpuVerdict

WELL = ("device", "compute capability", "triton", "linear", "CUDA graph", "linear int8", "linear int4")


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> list[GpuVerdict]:
    """A GPU that computes like the CPU; what the checks of it have found may be replaced in the list."""
    verdicts = [GpuVerdict(gpu="a card", checks=tuple(GpuCheck(name, "ok") for name in WELL))]
    monkeypatch.setattr(Placement, "on_one_gpu", property(lambda self: True))
    monkeypatch.setattr(Placement, "has_kernels", property(lambda self: False))
    monkeypatch.setattr(Placement, "gpus", property(lambda self: (FakeGpu(torch.device("cpu")),)))
    monkeypatch.setattr(loader, "kernels_of", lambda device: ReferenceBackend(records=True))
    monkeypatch.setattr(probe, "verdict_of", lambda device, say: verdicts[0])
    return verdicts


def open_model(folder: Path, **entry: Any) -> LLM:
    return LLM(folder, **{"context_length": 256, "cache_size": "8MiB", "max_sequences": 4, **entry})


def reply(llm: LLM) -> tuple[Any, ...]:
    [completion] = llm.generate("the bits of a reply", max_tokens=8, seed=3, temperature=0.8, logprobs=True)
    return completion.token_ids, tuple(entry.logprob.hex() for entry in completion.logprobs or ())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose layers can be rounded in groups of 128 columns."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
    return tiny_models.write(tmp_path, "llama", **sizes)


@pytest.mark.slow
def test_rounded_weights_are_other_models_with_names_of_their_own(folder: Path) -> None:
    found = {kind: open_model(folder, quantization=kind) for kind in (None, "int8", "int4")}
    assert [llm.info.linear for llm in found.values()] == ["triton", "triton int8", "triton int4"]
    for llm in found.values():
        assert llm.info.gpu == GpuReport("graphs"), llm.info.law
        assert llm.info.law.holds
        assert llm.info.memory.startswith("24.0 GiB: weights ")
    assert len({llm.info.system_fingerprint for llm in found.values()}) == 3
    assert len({reply(llm) for llm in found.values()}) == 3
    assert reply(open_model(folder, quantization="int4", gpu="no-graphs")) == reply(found["int4"])


@pytest.mark.parametrize(
    "form", ["gptq", *(pytest.param(form, marks=pytest.mark.slow) for form in ("awq", "compressed-tensors"))]
)
def test_checkpoints_of_others_stay_packed(form: str, tmp_path: Path) -> None:
    quantise(tmp_path, form)
    llm = open_model(tmp_path, dtype="float32")
    assert (llm.info.linear, llm.info.gpu, llm.info.law.holds) == ("triton int4", GpuReport("graphs"), True)
    alone = reply(llm)
    for number in range(3):
        llm.add("neighbour " * (5 + 9 * number), max_tokens=20)
    assert reply(llm) == alone


@pytest.mark.slow
def test_graphs_and_single_launches_have_the_same_bits_and_fingerprint(folder: Path) -> None:
    graphs, launches = open_model(folder), open_model(folder, gpu="no-graphs")
    assert launches.info.gpu == GpuReport("kernels", (("graphs", "the entry says gpu: no-graphs"),))
    assert reply(graphs) == reply(launches)
    assert graphs.info.system_fingerprint == launches.info.system_fingerprint


def test_a_card_whose_kernels_fail_serves_by_torch(folder: Path, card: list[GpuVerdict]) -> None:
    broken = GpuCheck("linear", "failed", "wrong numbers")
    card[0] = dataclasses.replace(card[0], checks=tuple(broken if c.name == "linear" else c for c in card[0].checks))
    llm = open_model(folder)
    assert llm.info.gpu is not None
    assert llm.info.gpu.describe() == "torch (not graphs, kernels: linear: wrong numbers)"
    assert llm.info.linear == "torch"
    assert len(reply(llm)[0]) == 8


@pytest.mark.slow
def test_without_kernels_rounded_weights_are_widened_again(folder: Path) -> None:
    """Slowly: the same rounded model as with kernels, and no other."""
    llm, kernels = (open_model(folder, quantization="int4", **more) for more in ({"gpu": "no-kernels"}, {}))
    assert llm.info.linear == "torch int4"
    assert llm.info.gpu is not None
    assert llm.info.gpu.rung == "torch"
    mine, right = reply(llm), reply(kernels)
    assert mine[0] == right[0]
    assert llm.info.system_fingerprint != open_model(folder, gpu="no-kernels").info.system_fingerprint


@pytest.mark.slow
def test_a_weight_that_cannot_be_rounded_is_refused_by_name(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(LoadError, match=r"quantization: int4 cannot be used: down_proj: .* 96 columns in groups"):
        open_model(tiny("llama"), quantization="int4")
    assert open_model(tiny("llama"), quantization="int8").info.linear == "triton int8"

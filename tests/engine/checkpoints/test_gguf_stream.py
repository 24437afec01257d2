"""GGUF files whose quantised weights stay packed: the numbers of plain transformers, the law, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters_for_tests as adapters
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import LLM, LoadError, ModelConfig
from engine.checkpoints import gguf_file
from engine.checkpoints.gguf.stream import packed_bytes
from engine.compute.cpu.kernels import Kernels, NoKernels
from engine.compute.cpu.linear import NativeLinear
from engine.compute.cpu.stored_linear import StoredEmbedding, StoredLinear
from engine.loading import placement
from engine.loading.loader import load
from tests.engine.checkpoints.gguf_quantised import Kinds, folder_of, packed, widened, write_quantised


def _kernels() -> Kernels | None:
    try:
        return Kernels.load()
    except NoKernels:
        return None


KERNELS = _kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no compiled kernels here: GGUF files are widened")


def _mixed(*kinds: str) -> Kinds:
    """Give neighbouring tensors different kinds."""
    return lambda name: kinds[sum(map(ord, name)) % len(kinds)]


CASES: Mapping[str, tuple[str, Kinds, bool, dict[str, Any]]] = {
    "llama, whose queries and keys are reordered": ("llama", _mixed("Q4_K", "Q6_K"), True, {}),
    "llama, not tied, with a few floats": ("llama", _mixed("Q8_0", "Q5_1", "F16"), False, {}),
    "qwen2, with biases": ("qwen2", _mixed("Q4_0", "Q2_K", "Q3_K"), True, {}),
    "qwen3": ("qwen3", _mixed("Q5_K", "Q5_0"), False, {"head_dim": 128, "tie_word_embeddings": False}),
    "gemma2, scaled and capped": ("gemma2", _mixed("Q4_K", "Q6_K"), True, {}),
    "gemma3": ("gemma3_text", _mixed("Q4_1"), True, {}),
    "phi3, whose projections are one": ("phi3", _mixed("Q4_K", "Q8_0"), False, {}),
}


def _write(case: str, tmp_path: Path) -> Path:
    family, kinds, tied, settings = CASES[case]
    folder = folder_of(tmp_path / "folder", family, **settings)
    return write_quantised(folder, tmp_path / "model.gguf", kinds, tied=tied)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write("llama, whose queries and keys are reordered", tmp_path_factory.mktemp("gguf"))


@torch.inference_mode()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model(torch.arange(3, 40, dtype=torch.int64)[None], use_cache=False).logits
    return logits


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_stand_for_the_numbers_of_transformers(case: str, tmp_path: Path) -> None:
    """As plain layers, without rounded inputs: each weight bit for bit, and so each logit."""
    file = _write(case, tmp_path)
    model, plain = packed(file), widened(file)
    kept = {name: part for name, part in model.named_modules() if isinstance(part, StoredLinear | StoredEmbedding)}
    assert len(kept) > 4
    for name, part in kept.items():
        original: Any = plain.get_submodule(name)
        assert torch.equal(part.weight, original.weight), name
        assert (getattr(part, "bias", None) is None) == (getattr(original, "bias", None) is None)
    others = dict(model.named_parameters())
    assert all(torch.equal(value, plain.get_parameter(name)) for name, value in others.items())
    assert torch.allclose(_logits(model), _logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_law_holds_over_packed_weights(case: str, tmp_path: Path) -> None:
    """The self-test has compared the logits with plain transformers', and bits alone with bits in a crowd."""
    llm = LLM(_write(case, tmp_path), context_length=512)
    assert llm.info.runner == "packed"
    assert llm.info.law.holds, llm.info.law.reason
    assert llm.info.linear == "native, as stored"


def test_a_tied_head_and_the_embedding_are_one_packed_weight(file: Path) -> None:
    model: Any = packed(file)
    assert model.lm_head.packed.data is model.model.embed_tokens.packed.data
    served: Any = load(ModelConfig(id="m", path=file, context_length=256)).runner
    served = served._model.model
    assert isinstance(served.lm_head, NativeLinear)
    assert served.lm_head.packed.data is served.model.embed_tokens.packed.data


def test_an_entry_can_have_the_numbers_of_transformers_instead(file: Path) -> None:
    """`quantization: none` widens all weights, and nothing of the fingerprint is the same by accident."""
    as_stored, exact = LLM(file, context_length=256), LLM(file, context_length=256, quantization="none")
    assert exact.info.linear == "native"
    assert exact.info.system_fingerprint != as_stored.info.system_fingerprint
    differ = {
        name
        for name in exact.info.fingerprint_parts.keys() | as_stored.info.fingerprint_parts.keys()
        if exact.info.fingerprint_parts.get(name) != as_stored.info.fingerprint_parts.get(name)
    }
    assert differ == {"linear", "inputs", "stored_layers"}


def test_without_kernels_a_file_is_widened(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any, **__: Any) -> Kernels:
        raise NoKernels("no compiler")

    monkeypatch.setattr(placement.Kernels, "load", none)
    llm = LLM(file, context_length=256)
    assert llm.info.linear in ("packed", "strict")
    assert "no compiled kernels (no compiler): linear layers run in torch" in caplog.text


def test_a_scale_that_is_no_number_is_refused_by_the_name_of_its_tensor(file: Path, tmp_path: Path) -> None:
    place = gguf_file.open_file(file, "m").places["blk.1.ffn_down.weight"]
    content = bytearray(file.read_bytes())
    kind = gguf_file.open_file(file, "m").types["blk.1.ffn_down.weight"]
    at = place.offset + (208 if kind == "Q6_K" else 0)
    content[at : at + 2] = np.array([np.inf], dtype=np.float16).tobytes()
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(content)
    with pytest.raises(LoadError, match=r"^m: model\.gguf is damaged: blk\.1\.ffn_down\.weight: it has scales"):
        load(ModelConfig(id="m", path=damaged))


def test_a_file_that_lacks_a_packed_weight_is_refused(file: Path, tmp_path: Path) -> None:
    """A layer that stays packed is missed like any other: under another name, it is one too few and one too many."""
    content = file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(LoadError, match=r"lacks 1 tensors of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(ModelConfig(id="m", path=tmp_path / "model.gguf"))


def test_architectures_whose_weights_are_changed_in_another_way_are_widened(file: Path) -> None:
    """Bloom's rows are split and joined anew, GPT-2's are turned: nothing about packed weights is guessed."""
    header = gguf_file.open_file(file, "m")
    assert packed_bytes(header) < 2 * header.stored_bytes
    for architecture in ("bloom", "gpt2", "mamba", "lfm2", "minimax-m2"):
        other = dataclasses.replace(header, metadata={**header.metadata, "general.architecture": architecture})
        assert packed_bytes(other) == 0


def test_adapters_are_computed_beside_packed_weights_and_merged_into_widened_ones(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder", "llama")
    file = write_quantised(folder, tmp_path / "model.gguf", _mixed("Q4_0", "Q6_K"))
    adapters.write(tmp_path / "one", folder)
    beside = LLM(file, context_length=256, adapters=[{"name": "one", "path": tmp_path / "one"}])
    assert beside.info.linear == "native, as stored"
    assert beside.info.adapters["one"].law.holds
    merged = LLM(file, context_length=256, adapters=[{"name": "one", "path": tmp_path / "one", "merge": True}])
    assert (merged.info.linear, merged.info.merged_adapter) == ("native", "one")


_MEASURE = """
import dataclasses, sys, torch
from pathlib import Path
from engine.compute.cpu.kernels import Kernels
from engine.host_memory import give_back_memory
from tests.engine.checkpoints.gguf_quantised import packed

@dataclasses.dataclass
class Stored:  # bytes and scales, whatever the kernels' own layout is
    data: torch.Tensor
    scales: torch.Tensor
    columns: int
    depth: int
    bias: torch.Tensor | None = None

def pack(self, groups, bias):
    return Stored(groups.numbers.clone(), groups.scales, groups.columns, groups.depth)

def status(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

Kernels.pack_groups = pack
packed(Path(sys.argv[1]))  # whatever is allocated once
give_back_memory()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = packed(Path(sys.argv[2]))
peak = status("VmHWM")
give_back_memory()
print(before, peak, status("VmRSS"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_no_weight_is_held_in_float32(file: Path, tmp_path: Path) -> None:
    """Nor is the file: the peak is little more than what stays, which is the file's size and not four times that."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "head_dim": 256}
    big = write_quantised(folder_of(tmp_path / "folder", "llama", **sizes), tmp_path / "big.gguf", _mixed("Q8_0"))
    # What is freed goes back at once: else malloc holds some hundred MiB of it or none, from one run to the next.
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", _MEASURE, str(file), str(big)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=given_back)
    before, peak, after = (1024 * int(number) for number in run.stdout.split()[-3:])
    assert after - before < 1.1 * big.stat().st_size
    assert peak - before < 1.15 * (after - before), f"{(peak - before) >> 20} MiB for {(after - before) >> 20}"

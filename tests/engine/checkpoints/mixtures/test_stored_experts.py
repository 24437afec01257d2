"""Experts packed while they are read, from folders and GGUF files: the files' numbers, and the law over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import LLM, LoadError, ModelConfig
from engine.checkpoints import checkpoint
from engine.checkpoints.gguf.stream import packed_bytes
from engine.checkpoints.gguf_file import open_file
from engine.checkpoints.reading import load_model
from engine.checkpoints.streamed.layers import Streaming
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.experts import NativeExperts
from engine.compute.cpu.layers.own_weight import OwnWeight
from engine.compute.cpu.layers.own_weights import widen_own_weights
from engine.loading.loader import load
from tests import tiny_models
from tests.engine.checkpoints.gguf_quantised import Kinds, folder_of, packed, widened, write_quantised
from tests.engine.checkpoints.test_packed_layers import quantise

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "head_dim": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": MOE,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4},
}


def _read(folder: Path, how: Streaming | None) -> Any:
    config = ModelConfig(id="tiny", path=folder)
    found = checkpoint.inspect(folder, "tiny")
    return load_model(config, found, torch.float32, {"": "cpu"}, None, streaming=how)


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(torch.arange(3, 40, dtype=torch.int64)[None], use_cache=False).logits
    return logits


def _own(model: nn.Module) -> dict[str, OwnWeight]:
    return {
        f"{place}.{name}": value
        for place, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, OwnWeight)
    }


def _keeps_the_law(path: Path, linear: str, **entry: Any) -> LLM:
    """The self-test's trials, and a reply alone and beside others."""
    llm = LLM(path, context_length=256, **entry)
    info = llm.engine.model.info
    assert (info.runner, info.linear) == ("packed", linear)
    assert info.law.holds, info.law.reason
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
    alone = llm.generate("Once upon a time", **fields)
    crowd = llm.generate_many(["Once upon a time", "Some other text that is longer", "x"], **fields)[0]
    assert [one.text for one in alone] == [one.text for one in crowd]
    return llm


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_of_a_folder_are_packed_as_they_are_read(
    family: str, dtype: torch.dtype, tmp_path: Path, kernels: Kernels
) -> None:
    """The numbers of plain transformers, in half of float32's memory if they are bfloat16."""
    tiny_models.write(tmp_path, family, dtype=dtype, **MIXTURES[family])
    streamed, plain = _read(tmp_path, Streaming(kernels, None)), _read(tmp_path, None)
    own = _own(streamed)
    assert len(own) == 4
    for name, weight in own.items():
        assert torch.equal(weight.widened(), plain.get_parameter(name)), name
        assert {part.kind for part in weight.parts} == {"bfloat16" if dtype == torch.bfloat16 else "float32"}
    assert not any(parameter.is_meta for parameter in streamed.parameters())
    plain.set_experts_implementation("eager")
    assert torch.equal(_logits(streamed), _logits(plain))
    widen_own_weights(streamed)
    assert not _own(streamed)
    assert torch.equal(_logits(streamed), _logits(plain))


@pytest.mark.parametrize("rounds", [None, "int8", "int4"])
def test_the_law_holds_over_rounded_experts(rounds: str | None, tmp_path: Path) -> None:
    tiny_models.write(tmp_path, "qwen3_moe", dtype=torch.bfloat16, **MIXTURES["qwen3_moe"])
    _keeps_the_law(tmp_path, f"native {rounds or ''}".strip(), quantization=rounds)
    served: Any = load(ModelConfig(id="m", path=tmp_path, context_length=256, quantization=rounds)).runner
    experts = [module for module in served._model.model.modules() if isinstance(module, NativeExperts)]
    kinds = {part.kind for module in experts for weights in module.kernel._kept[:2] for part in weights}
    assert (len(experts), kinds) == (2, {{None: "bfloat16", "int8": "int8", "int4": "grouped"}[rounds]})


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_experts_that_come_quantised_are_refused_by_name(form: str, tmp_path: Path) -> None:
    tiny_models.FAMILIES.setdefault("qwen3_moe", MIXTURES["qwen3_moe"])
    quantise(tmp_path, form, "qwen3_moe")
    with pytest.raises(
        LoadError, match=r"experts\.\d+\.\w+_proj is quantised; experts are read from float checkpoints"
    ):
        LLM(tmp_path)


# -- GGUF files --------------------------------------------------------------------------------------------------------

GGUF: dict[str, tuple[str, Kinds]] = {
    "one kind": ("qwen3_moe", lambda name: "Q4_K"),
    "other kinds of down": ("qwen3_moe", lambda name: "Q6_K" if "down" in name else "Q5_0"),
    "gate and up differ": ("qwen3_moe", lambda name: "Q8_0" if "gate_exps" in name else "Q4_0"),
    "a shared expert": ("qwen2_moe", lambda name: "F32" if "shexp" in name and "inp" in name else "Q4_0"),
}


def _file(case: str, folder: Path) -> Path:
    family, kinds = GGUF[case]
    # What transformers does not read from a file is what it is in the published ones: the sizes of experts.
    inner = {"moe_intermediate_size": 768}
    if family == "qwen2_moe":
        inner = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, **inner}
    return write_quantised(folder_of(folder / "folder", family, **sizes), folder / "model.gguf", kinds, tied=False)


@pytest.mark.parametrize("case", GGUF)
def test_experts_of_a_file_stay_as_they_are(case: str, tmp_path: Path, kernels: Kernels) -> None:
    """The numbers of transformers' own reading, bit for bit; gate and up of different kinds are widened."""
    file = _file(case, tmp_path)
    model, plain = packed(file), widened(file)
    own = _own(model)
    assert {name.rpartition(".")[2] for name in own} == (
        {"down_proj"} if "differ" in case else {"gate_up_proj", "down_proj"}
    )
    for name, weight in own.items():
        assert torch.equal(weight.widened(), plain.get_parameter(name)), name
        assert {part.kind for part in weight.parts} == {"grouped"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    plain.set_experts_implementation("eager")  # type: ignore[operator]
    torch.testing.assert_close(_logits(model), _logits(plain), rtol=1e-5, atol=1e-5)
    assert packed_bytes(open_file(file, "m")) < 4 * sum(open_file(file, "m").sizes.values())


@pytest.mark.parametrize("case", GGUF)
def test_the_law_holds_over_a_file_of_a_mixture(case: str, tmp_path: Path) -> None:
    file = _file(case, tmp_path)
    llm = _keeps_the_law(file, "native, as stored")
    exact = _keeps_the_law(file, "native", quantization="none")
    assert exact.info.system_fingerprint != llm.info.system_fingerprint


def test_a_damaged_scale_of_an_expert_is_named(tmp_path: Path) -> None:
    file = _file("one kind", tmp_path)
    place = open_file(file, "m").places["blk.1.ffn_up_exps.weight"]
    content = bytearray(file.read_bytes())
    content[place.offset + place.size - 144 : place.offset + place.size - 142] = b"\x00\x7c"
    file.write_bytes(content)
    with pytest.raises(LoadError, match=r"damaged: blk\.1\.ffn_up_exps\.weight: it has scales that are not finite"):
        load(ModelConfig(id="m", path=file))

"""Weights packed while they are read: the files' numbers, tied ones once, and what is strange refused as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine import LLM, LoadError, ModelConfig
from engine.checkpoints import checkpoint
from engine.checkpoints.reading import load_model
from engine.checkpoints.streamed.layers import Streaming
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.reordered import ReorderedLinear
from engine.compute.cpu.stored_linear import StoredEmbedding, StoredLinear
from engine.loading.streams import streaming
from tests import tiny_models
from tests.engine.checkpoints.test_packed_layers import quantise
from tests.engine.compute.cuda.foreign_layers import Layer

CPU = {"": "cpu"}
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels.load()


def load(folder: Path, how: Streaming | None) -> Any:
    config = ModelConfig(id="tiny", path=folder)
    return load_model(config, checkpoint.inspect(folder, "tiny"), torch.float32, CPU, None, streaming=how)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(IDS).logits
    return out


@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3", "gemma3_text", "gpt2", "gpt_oss", "mamba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_that_is_not_rounded_has_the_bits_of_plain_transformers(
    family: str, dtype: torch.dtype, tmp_path: Path, kernels: Kernels
) -> None:
    """Whatever it ties, transposes, scales or reads by itself; nothing is left without memory or as a plain layer."""
    tiny_models.write(tmp_path, family, dtype=dtype)
    streamed = load(tmp_path, Streaming(kernels, None))
    assert torch.equal(logits(streamed), logits(load(tmp_path, None)))
    assert any(isinstance(module, StoredLinear) for module in streamed.modules())
    assert not [m for m in streamed.modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]
    assert not any(parameter.is_meta for parameter in streamed.parameters())
    assert not hasattr(streamed.config, "quantization_config")


@pytest.mark.parametrize("rounds", [None, "int4"])
def test_a_tied_weight_is_packed_once(rounds: str | None, tmp_path: Path, kernels: Kernels) -> None:
    """Also if the file holds it twice."""
    tiny_models.write(tmp_path, "qwen3")
    file = tmp_path / "model.safetensors"
    for twice in (False, True):
        if twice:
            tensors = load_file(file)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, file, {"format": "pt"})
        model = load(tmp_path, Streaming(kernels, rounds))
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(table, StoredEmbedding)
        assert head.packed.data is table.packed.data


def test_int8_keeps_the_embedding_exact(tmp_path: Path, kernels: Kernels) -> None:
    tiny_models.write(tmp_path, "qwen3")
    model, plain = load(tmp_path, Streaming(kernels, "int8")), load(tmp_path, None)
    assert torch.equal(model.get_input_embeddings()(IDS), plain.get_input_embeddings()(IDS))
    assert {module.packed.kind for module in model.modules() if isinstance(module, StoredLinear)} == {"int8"}


def test_strange_files_are_refused_as_before(tmp_path: Path, kernels: Kernels) -> None:
    """A weight of another shape, one that is missing, a bias for a layer without one: by name."""
    tiny_models.write(tmp_path, "llama")
    file, place = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj"
    good = load_file(file)
    for change, words in (
        ({f"{place}.weight": torch.zeros(64, 95)}, rf"{place}.weight has the shape \[64, 95\]"),
        ({f"{place}.weight": None}, f"lacks 1 tensors .*{place}.weight"),
        ({f"{place}.bias": torch.zeros(64)}, f"holds {place}.bias, for which"),
    ):
        tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(LoadError, match=words):
            load(tmp_path, Streaming(kernels, None))
    save_file({**good, f"{place}.weight": torch.full((64, 96), float("nan"))}, file, {"format": "pt"})
    with pytest.raises(LoadError, match=f"{place}: a weight is not a finite number"):
        load(tmp_path, Streaming(kernels, "int4"))


def _keeps_the_law(folder: Path, linear: str, **entry: Any) -> None:
    """The self-test's trials, and a reply alone and beside others."""
    llm = LLM(folder, **entry)
    info = llm.engine.model.info
    assert info.law.holds, info.law.reason
    assert info.linear == info.fingerprint_parts["linear"] == linear
    fields = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
    alone = llm.generate("Once upon a time", **fields)
    crowd = llm.generate_many(["Once upon a time", "Some other text that is longer", "x"], **fields)[0]
    assert [one.text for one in alone] == [one.text for one in crowd]


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3_text"])
def test_int4_keeps_the_law(family: str, tmp_path: Path) -> None:
    tiny_models.write(tmp_path, family)
    _keeps_the_law(tmp_path, "native int4", quantization="int4")


def _scatter(folder: Path) -> None:
    """Give every layer of a GPTQ checkpoint groups of scattered columns: another model, in act order."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("g_idx")]:
        shuffled = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(5))
        tensors[name] = tensors[name][shuffled].contiguous()
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
@pytest.mark.parametrize("form", ["gptq", "act order", "awq", "compressed-tensors"])
def test_a_quantised_checkpoint_is_served_as_it_is(form: str, family: str, tmp_path: Path) -> None:
    """The same numbers as the widened ones; inputs are rounded, so the two have other names and other bits."""
    quantise(tmp_path, form.replace("act order", "gptq"), family)
    if form == "act order":
        _scatter(tmp_path)
    kernels = Kernels.load()
    config = ModelConfig(id="tiny", path=tmp_path)
    found = checkpoint.inspect(tmp_path, "tiny")
    stored, wide, plain = (
        load(tmp_path, streaming(config.model_copy(update={"quantization": rounds}), found, has))
        for rounds, has in ((None, kernels), ("none", kernels), (None, None))
    )
    assert any(isinstance(m, ReorderedLinear) for m in stored.modules()) == (form == "act order")
    assert not any(isinstance(m, StoredLinear) for m in plain.modules())
    assert torch.equal(logits(wide), logits(plain))
    assert torch.allclose(logits(stored), logits(plain), atol=1e-5)  # act order sums in another order
    _keeps_the_law(tmp_path, "native, as stored")
    _keeps_the_law(tmp_path, "native", quantization="none")


def test_a_quantised_layer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    quantise(tmp_path, "gptq")
    file, place = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj"
    tensors = load_file(file)
    tensors[f"{place}.g_idx"][0] = 2
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LoadError, match=rf"{place}: .*no groups of 32"):
        LLM(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != f"{place}.scales"}, file, {"format": "pt"})
    with pytest.raises(LoadError, match="scales"):
        LLM(tmp_path)


def test_int4_rounds_an_output_layer_that_comes_quantised_to_six_bits(tmp_path: Path, kernels: Kernels) -> None:
    """As it does one that comes in floats."""
    quantise(tmp_path, "gptq", "phi3")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    layer = Layer(9, *tensors.pop("lm_head.weight").shape, size=32)
    layer.scale *= 0.02
    layer.bias = None
    tensors |= {f"lm_head.{own}": tensor for own, tensor in layer.gptq(version=1)[0].items() if tensor is not None}
    save_file(tensors, file, {"format": "pt"})
    config = ModelConfig(id="tiny", path=tmp_path, quantization="int4")
    model = load(tmp_path, streaming(config, checkpoint.inspect(tmp_path, "tiny"), kernels))
    stored = {name: m.packed.format.bits for name, m in model.named_modules() if isinstance(m, StoredLinear)}
    assert stored.pop("lm_head") == 6
    assert set(stored.values()) == {4}

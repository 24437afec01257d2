"""Checkpoints that others have quantised, loaded with their weights packed: the numbers are those of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from engine.checkpoints import checkpoint, packed_layers
from engine.checkpoints.packed_layers import PackedLayer
from engine.checkpoints.reading import load_model
from engine.config import ModelConfig
from engine.errors import LoadError
from tests import tiny_models
from tests.engine.compute.cuda.foreign_layers import Layer

FORMATS: dict[str, Callable[[Layer], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "gptq": lambda layer: layer.gptq(version=1),
    "awq": lambda layer: layer.awq(),
    "compressed-tensors": lambda layer: layer.compressed(symmetric=False),
}


def quantise(folder: Path, form: str, family: str = "qwen2") -> dict[str, Tensor]:
    """Write a tiny checkpoint whose decoder's linear layers are quantised; return what their weights stand for."""
    tiny_models.FAMILIES.setdefault("qwen2", {})
    tiny_models.write(folder, family, dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    meant: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        place, plain = name.removesuffix(".weight"), tensors.pop(name)
        layer = Layer(len(meant), *plain.shape, size=32)
        layer.scale *= 0.02
        layer.bias = tensors.pop(f"{place}.bias", None)
        meant[place] = layer.numbers()
        stored, settings = FORMATS[form](layer)
        tensors |= {f"{place}.{own}": tensor for own, tensor in stored.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "quantization_config": settings}))
    return meant


def load(folder: Path) -> nn.Module:
    config = ModelConfig(id="tiny", path=folder)
    found = checkpoint.inspect(folder, "tiny")
    return load_model(config, found, torch.float16, {"": "cpu"}, None, packed=True)


@pytest.mark.parametrize("form", FORMATS)
def test_the_model_is_the_one_that_was_quantised(form: str, tmp_path: Path) -> None:
    """Every weight in four bits, none rounded again; the logits are those of the same numbers as plain weights."""
    meant = quantise(tmp_path, form)
    model = load(tmp_path)
    layers = {place: layer for place, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    assert set(layers) == set(meant)
    assert not list(next(iter(layers.values())).buffers())
    for place, layer in layers.items():
        assert layer.packed is not None
        assert layer.packed.kind == "int4"
        assert torch.equal(packed_layers.weights.widened(layer.packed).double(), meant[place])
    plain = AutoModelForCausalLM.from_config(_without_quantisation(model), dtype=torch.float16).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    state |= {f"{place}.weight": weight.half() for place, weight in meant.items()}
    state |= {f"{place}.bias": layer.packed.bias for place, layer in layers.items() if layer.packed.bias is not None}
    plain.load_state_dict(state)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def _without_quantisation(model: nn.Module) -> Any:
    settings = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    settings._attn_implementation = model.config._attn_implementation
    return settings


def test_what_cannot_stay_packed_is_refused_by_layer_and_reason(tmp_path: Path) -> None:
    """Nothing is served that would answer noise: act order, a tensor that is missing, a weight of another shape."""
    quantise(tmp_path, "gptq")
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    place = "model.layers.1.mlp.down_proj"
    scattered = {f"{place}.g_idx": good[f"{place}.g_idx"].flip(0)}
    stored = ("qweight", "qzeros", "scales", "g_idx")
    short = {f"{place}.{own}": good[f"model.layers.1.self_attn.o_proj.{own}"].clone() for own in stored}
    for change, words in ((scattered, rf"{place}: .*desc_act"), (short, rf"{place}: .*\[64, 64\].*\[64, 96\]")):
        save_file({**good, **change}, file, {"format": "pt"})
        with pytest.raises(LoadError, match=words):
            load(tmp_path)
    save_file({name: t for name, t in good.items() if name != f"{place}.scales"}, file, {"format": "pt"})
    with pytest.raises(LoadError, match="scales"):
        load(tmp_path)


def test_only_what_is_quantised_by_a_known_method_can_stay_packed(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "plain", "llama")
    assert not packed_layers.can_stay_packed(checkpoint.inspect(tmp_path / "plain", "plain"))
    quantise(tmp_path / "awq", "awq")
    found = checkpoint.inspect(tmp_path / "awq", "awq")
    assert packed_layers.can_stay_packed(found)
    found.config["quantization_config"]["quant_method"] = "hqq"
    assert not packed_layers.can_stay_packed(found)
    plain = checkpoint.inspect(tmp_path / "plain", "plain")
    plain.config["quantization_config"] = {"quant_method": "awq"}
    with pytest.raises(LoadError, match="no packed layer"):
        packed_layers.describe(plain, "plain")

"""What a folder holds besides weights and template: left out with a reason, inside the folder, in the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_folders import edit as _edit, refused as _refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import LLM, ModelConfig
from engine.checkpoints import checkpoint, reading
from engine.loading.loader import load


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("qwen3"), tmp_path / "model"))


KEPT = (
    *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.bias", "rotary_emb.inv_freq"),
    *("model.layers.0.self_attn.masked_bias", "model.layers.2.mlp.up_proj.weight", "mtp.layers.0.mlp.up_proj.weight"),
    *("visual.blocks.0.attn.qkv.weight", "v_head.summary.weight", "lm_head.weight", "score.weight"),
)


def test_what_a_model_rightly_leaves_out_is_no_reason(folder: Path) -> None:
    """Published checkpoints hold old buffers, layers that predict several tokens, other heads, and what sees."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    more = {name: head if name == "lm_head.weight" else torch.ones(2, 2) for name in KEPT}
    [before] = LLM(folder).generate("Hello", max_tokens=4, temperature=0)
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})
    [after] = LLM(folder).generate("Hello", max_tokens=4, temperature=0)
    assert after.token_ids == before.token_ids


@pytest.mark.parametrize(
    ("key", "quantised", "refused"),
    [
        ("transformer.h.0.attn.bias", False, False),
        ("transformer.h.0.attn.masked_bias", False, False),
        ("transformer.h.0.attn.c_attn.weight_scale", True, False),
        ("transformer.h.0.attn.c_attn.weight_scale", False, True),
        ("transformer.h.0.ln_1.gate", False, True),
        ("lm_head.bias", True, True),
    ],
)
def test_a_parameter_of_a_module_that_is_there_is_missed(
    key: str, quantised: bool, refused: bool, tiny: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    found = checkpoint.inspect(tiny("gpt2"), "m")
    if quantised:
        found.config["quantization_config"] = {"quant_method": "fp8"}
    assert reading.dropped_tensors(model, {key}, found) == ([key] if refused else [])


def test_links_of_the_hubs_cache_and_inside_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (snapshot / "more.json").symlink_to("config.json")
    before = load(ModelConfig(id="m", path=snapshot)).info.system_fingerprint
    assert load(ModelConfig(id="m", path=tmp_path / "models--a--b" / "snapshots" / ".." / "snapshots" / "1"))
    (tmp_path / "link").symlink_to(snapshot)
    assert load(ModelConfig(id="m", path=tmp_path / "link")).info.system_fingerprint == before
    (tmp_path / "model.txt").write_text("a secret")
    (snapshot / "merges.txt").symlink_to(tmp_path / "model.txt")
    _refused(snapshot, r"merges\.txt is a link to .*model\.txt, outside")


def test_weights_may_lie_on_another_disk(folder: Path, tmp_path: Path) -> None:
    before = load(ModelConfig(id="m", path=folder)).info.system_fingerprint
    weights = (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(weights)
    assert load(ModelConfig(id="m", path=folder)).info.system_fingerprint == before
    weights.write_text("a secret")
    _refused(folder, "not a readable safetensors file")


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("added_tokens.json", {"hello": 440}),
        ("special_tokens_map.json", {"bos_token": "hello"}),
        ("tokenizer_config.json", {"bos_token": "hello"}),
        ("tokenizer_config.json", {"bos_token": "<|im_start|>"}),  # which a template may write
    ],
)
def test_whatever_changes_tokens_changes_the_fingerprint(file: str, fields: dict[str, Any], folder: Path) -> None:
    """And what does not leaves it: the order of keys, a remark."""
    (folder / file).unlink(missing_ok=True)  # the first two are read only where nothing else says it
    if file != "tokenizer_config.json":
        (folder / "tokenizer_config.json").unlink()
    before = load(ModelConfig(id="m", path=folder))
    _edit(folder / file, **fields)
    after = load(ModelConfig(id="m", path=folder))
    same = (
        after.tokenizer("hello you")["input_ids"] == before.tokenizer("hello you")["input_ids"]
        and after.tokenizer.special_tokens_map == before.tokenizer.special_tokens_map
    )
    assert not same
    assert after.info.system_fingerprint != before.info.system_fingerprint
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(json.dumps(dict(reversed(json.loads(text).items())), indent=1))
    assert load(ModelConfig(id="m", path=folder)).info.system_fingerprint == after.info.system_fingerprint

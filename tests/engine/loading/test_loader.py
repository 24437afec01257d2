"""Whatever is wrong with a checkpoint is said in one sentence, with what to do, before memory is filled."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, ConfigError, LoadError, ModelConfig, NotEnoughMemory
from engine.checkpoints import checkpoint
from engine.compute.cpu.kernels import Kernels, NoKernels
from engine.compute.cpu.packed_weight import Product
from engine.llm import Completion
from engine.loading import loader, placement
from engine.loading.loader import load
from engine.loading.memory.cache_size import context_length


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("qwen3"), tmp_path / "model"))


def _edit(path: Path, **fields: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **fields}))


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (_remove_weights, r"holds no \*\.safetensors file"),
    "pickled weights": (_pickle_only, r"pytorch_model\.bin can run code .* not loaded; convert it"),
    "cut short": (_cut_short, r"model\.safetensors is cut short: \d+ bytes of \d+"),
    "garbage": (_garbage, r"not a readable safetensors file"),
    "empty": (_empty, r"not a readable safetensors file"),
    "a tensor is missing": (_drop_tensor, r"lacks 1 tensors of Qwen3ForCausalLM: model\.layers\.1\.mlp\.up_proj"),
    "a shard is missing": (_missing_shard, r"lacks 1 of 2 weight files: model-00002-of-00002"),
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no config\.json: it is not a checkpoint folder"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), r"cannot read .*config\.json"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], r"tokenizer"),
    "unknown architecture": (lambda f: _edit(f / "config.json", model_type="nope"), r"transformers cannot load"),
    "broken template": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
        r"not valid Jinja: line 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, folder: Path) -> None:
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(LoadError, match=message):
        load(ModelConfig(id="m", path=folder))


ENTRIES: dict[str, tuple[dict[str, object], str]] = {
    "no such folder": ({"path": Path("/no/such/folder")}, r"the folder /no/such/folder does not exist"),
    "not in the hub cache": ({"path": None, "repo": "some/model"}, r"some/model .* not in the local hub cache.*--pull"),
    "no GPU": ({"device": "cuda:7"}, r"sees no GPU|there is no cuda:7"),
    "longer than trained": ({"context_length": 5000}, r"context_length is 5000, the model was built for 2048"),
    "cache too small": ({"cache_size": 1000, "context_length": 512}, r"cache for 512 tokens needs .* are given to it"),
    "missing template": ({"chat_template": Path("/nope.jinja")}, r"cannot read the chat template /nope\.jinja"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_impossible_entry_is_named(
    entry: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields, message = ENTRIES[entry]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(LoadError, match=message):
        load(ModelConfig(**{"id": "m", "path": folder, **fields}))


def test_too_little_memory_says_how_much_is_needed_and_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_memory", lambda: 100_000)
    with pytest.raises(
        NotEnoughMemory, match=r"need \d+\.\d [KM]iB of memory as float32, 97\.7 KiB are free"
    ) as caught:
        load(ModelConfig(id="m", path=folder))
    assert caught.value.details["free"] == 100_000
    assert caught.value.details["needed"] > 100_000


def test_models_that_are_loaded_at_once_are_whole(tiny: Callable[[str], Path]) -> None:
    """transformers' loading has switches for the whole process; one load waits for another."""
    families = ("qwen3", "llama", "gemma3_text", "phi3")
    entries = [ModelConfig(id=f, path=tiny(f), cache_size="4MiB", context_length=128, threads=1) for f in families]
    alone = {entry.id: load(entry).info for entry in entries}
    with ThreadPoolExecutor(len(entries)) as pool:
        for _ in range(2):
            for model in pool.map(load, entries):
                assert model.info == alone[model.info.id]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("rounds", [None, "int8"])
def test_the_estimate_is_what_the_model_takes(folder: Path, rounds: str | None) -> None:
    found = checkpoint.inspect(folder, "m")
    model = LLM(folder, quantization=rounds).engine.model.runner._model.model  # type: ignore[attr-defined]
    packed = {id(m.packed.data): m.packed.data.nbytes for m in model.modules() if hasattr(m, "packed")}
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.tied
    assert found.dtype == "bfloat16"
    # Rounded groups are of 128 numbers, and these layers have 64 or 96.
    assert found.packed_bytes(rounds) == pytest.approx(sum(packed.values()) + rest, rel=0.5 if rounds else 0.05)


def test_the_fingerprint_changes_with_what_bits_depend_on_and_with_nothing_else(folder: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, **config: object) -> str:
        return load(ModelConfig(**{"id": "m", "path": path, **config})).info.system_fingerprint

    first = fingerprint(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert fingerprint(moved, id="another", max_sequences=3, cache_size="8MiB", max_batch_tokens=9, threads=1) == first
    seen = {first}
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    seen.add(fingerprint(moved))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    seen.add(fingerprint(folder))
    _edit(folder / "config.json", rms_norm_eps=1e-5)
    seen.add(fingerprint(folder))
    seen.add(fingerprint(folder, dtype="bfloat16"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    seen.add(fingerprint(folder))
    assert len(seen) == 6
    assert all(f.startswith("vb-") and len(f) == 19 for f in seen)


def test_defaults_come_from_the_checkpoint_then_from_the_entry(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "do_sample": True}))
    info = load(ModelConfig(id="m", path=folder, sampling={"temperature": 0.3})).info
    assert info.default_sampling == {"temperature": 0.3, "top_k": 20}
    _edit(folder / "generation_config.json", do_sample=False)
    assert load(ModelConfig(id="m", path=folder)).info.default_sampling == {}


def test_end_tokens_come_from_every_place_that_names_one(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert set(load(ModelConfig(id="m", path=folder)).end_ids) == {2, 9}


def test_the_context_shrinks_to_what_the_cache_holds_unless_it_was_asked_for(folder: Path) -> None:
    small = load(ModelConfig(id="m", path=folder, cache_size="1MiB")).info
    assert small.context_length == small.cache_tokens < 2048


def test_the_law_is_judged_not_assumed(folder: Path) -> None:
    """With bfloat16 arithmetic on a CPU nothing is packed; the report says so or the bits really agree."""
    assert load(ModelConfig(id="m", path=folder)).info.law.holds
    report = load(ModelConfig(id="m", path=folder, dtype="bfloat16")).info.law
    assert report.holds == all(ok for _, ok in report.checks)


def test_an_unknown_key_suggests_the_nearest() -> None:
    from engine import parse_models

    with pytest.raises(
        ConfigError, match=r"m\.yaml: models\[0\]: unknown key 'contextlength'; did you mean 'context_length'"
    ):
        parse_models([{"id": "a", "path": "x", "contextlength": 4}], base=Path("/"), where="m.yaml")


def test_gpu_free_paths_do_not_touch_cuda() -> None:
    assert not torch.cuda.is_initialized()


# -- kernels ---------------------------------------------------------------------------------------------------------


def _compiled() -> bool:
    try:
        Kernels.load()
    except NoKernels:
        return False
    return True


def test_int8_is_another_model_and_as_reproducible(folder: Path) -> None:
    if not _compiled():
        pytest.skip("no compiled kernels on this machine")
    prompts = ["Hello", "one two three four", "x" * 200]
    rounded, exact = LLM(folder, quantization="int8"), LLM(folder)
    assert rounded.info.law.holds, rounded.info.law.reason
    assert rounded.info.linear == "native int8"
    assert rounded.info.system_fingerprint != exact.info.system_fingerprint
    params = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "logprobs": True}

    def bits(replies: list[list[Completion]]) -> list[object]:
        return [(choice.token_ids, choice.logprobs) for reply in replies for choice in reply]

    together = bits(rounded.generate_many(prompts, **params))
    assert bits([rounded.generate(prompt, **params) for prompt in prompts]) == together
    assert together != bits(exact.generate_many(prompts, **params))


@pytest.mark.slow
def test_a_part_that_is_replaced_wrongly_is_seen_with_int8_too(
    kernels: Kernels, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(model: Any, native: Kernels) -> int:
        model.model.norm.weight.mul_(torch.linspace(0.2, 3, model.model.norm.weight.numel()))
        return 0

    monkeypatch.setattr("engine.compute.cpu.backend.replace_pointwise", replace)
    with pytest.raises(LoadError, match="differs from plain transformers"):
        load(ModelConfig(id="m", path=folder, quantization="int8"))


@pytest.mark.parametrize("name", ["max_position_embeddings", "max_seq_len", "max_target_positions"])
def test_the_context_is_what_the_model_was_built_for_whatever_it_is_called(name: str) -> None:
    """A longer one would fail in the middle of a step (MPT calls it max_seq_len)."""
    text = SimpleNamespace(**{name: 300})
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert context_length(ModelConfig(id="m", path=Path()), model) == 300
    with pytest.raises(LoadError, match="built for 300"):
        context_length(ModelConfig(id="m", path=Path(), context_length=301), model)


def test_without_a_compiler_a_model_is_served_and_int8_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    loaded = load(ModelConfig(id="m", path=folder))
    assert loaded.info.law.holds, loaded.info.law.reason
    assert loaded.info.linear in ("packed", "strict")
    assert "no C compiler was found" in caplog.text
    with pytest.raises(LoadError, match=r"quantization: int8 needs compiled kernels: no C compiler was found"):
        load(ModelConfig(id="m", path=folder, quantization="int8"))


def test_kernels_that_compute_wrongly_are_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler or a processor may be at fault; a reply must not be."""
    if not _compiled():
        pytest.skip("no compiled kernels on this machine")
    honest = Product.__call__
    monkeypatch.setattr(Product, "__call__", lambda self, x: [out * 1.01 for out in honest(self, x)])
    loaded = load(ModelConfig(id="m", path=folder))
    assert loaded.info.linear in ("packed", "strict")
    assert "do not compute rightly here" in caplog.text


def test_int8_is_for_float32_on_a_cpu(folder: Path) -> None:
    with pytest.raises(
        LoadError, match=r"quantization: int8 is for float32 on a CPU, or for one GPU, not torch\.bfloat16 on cpu"
    ):
        load(ModelConfig(id="m", path=folder, quantization="int8", dtype="bfloat16"))


# -- checkpoints that come quantised ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "package", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "optimum", r"quantised \(gptq\), .*pip install optimum"),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv"},
            "gptqmodel",
            r"quantised \(awq\), .*pip install gptqmodel",
        ),
        (
            {"quant_method": "compressed-tensors"},
            "compressed_tensors",
            r"quantised \(compressed-tensors\), .*compressed-tensors",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes",
            r"quantised \(bitsandbytes\), .*pip install -U bitsandbytes",
        ),
        ({"quant_method": "nope"}, "", r"quantised \(nope\), and cannot be loaded here: .*nope"),
        ({}, "", r"quantised \(unknown\)"),
        ("text", "", r"quantised \(unknown\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_missing_for_a_quantised_checkpoint_is_named_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: object, package: str, message: str
) -> None:
    if package and importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    _edit(folder / "config.json", quantization_config=given)
    monkeypatch.setattr(loader, "load_model", None)
    with pytest.raises(LoadError, match=message) as caught:
        load(ModelConfig(id="m", path=folder))
    assert "\n" not in caught.value.message


def test_fp8_weights_are_widened_on_a_cpu_and_served(folder: Path) -> None:
    """Fine-grained FP8: bytes, and a scale for each block. The law holds with what they become."""
    tensors = load_file(folder / "model.safetensors")
    widened = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().max() / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        widened[name] = tensors[name].float() * scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _edit(
        folder / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    )
    llm = LLM(folder)
    assert llm.info.law.holds, llm.info.law.reason
    model = llm.engine.model.runner._model.model  # type: ignore[attr-defined]
    name = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(model.get_submodule(name).weight, widened[f"{name}.weight"], rtol=0.01, atol=1e-4)
    assert llm.generate("Hello", max_tokens=4, seed=1)[0].usage.completion_tokens > 0


def test_nothing_is_asked_on_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server has nobody there, and a `y` that happens to wait would run a checkpoint's code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    _edit(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"},
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    )
    _edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Own"]})
    with pytest.raises(LoadError, match="contains custom code"):
        load(ModelConfig(id="m", path=folder))

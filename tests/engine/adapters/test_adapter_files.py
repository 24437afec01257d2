"""Files of adapters: what PEFT would compute is computed, everything else is refused by name, nothing is guessed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters_for_tests as adapters
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine import LoadError
from engine.adapters.layers import computed_plainly, places_of
from engine.adapters.merging import merge
from engine.adapters.patterns import BadPattern, first_match, matches
from engine.adapters.weights import Adapter, AdapterFiles
from engine.config import AdapterEntry

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"


@pytest.fixture(scope="module")
def base(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)


def read(folder: Path, base: Path, *, whole: bool = True) -> Adapter | AdapterFiles:
    files = AdapterFiles.inspect(AdapterEntry(name="a", path=folder), "m")
    return files.load(plain(base)) if whole else files


def refused(folder: Path, base: Path) -> str:
    with pytest.raises(LoadError) as caught:
        read(folder, base)
    assert caught.value.message.startswith("m: adapters.a: ")
    assert len(caught.value.message) < 700
    return caught.value.message.removeprefix("m: adapters.a: ")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora asks for"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora asks for"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora asks for"),
    "biases": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "a bias of its own": ({"lora_bias": True}, "lora_bias asks for"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save asks for"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices asks for"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication asks for"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters asks for"),
    "aLoRA": ({"alora_invocation_tokens": [7, 8]}, "alora_invocation_tokens asks for"),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying asks for"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "a key of tomorrow": ({"use_warp": True}, "'use_warp' is not known"),
    "no rank": ({"r": None}, "r must be a whole number"),
    "rank 0": ({"r": 0}, "r must be a whole number"),
    "a rank that is true": ({"r": True}, "r must be a whole number"),
    "an alpha without end": ({"lora_alpha": 1e300}, "lora_alpha must be a number"),
    "no targets": ({"target_modules": None}, "target_modules must be"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules must be"),
    "rslora as text": ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    "a pattern that is a list": ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),
    "a pattern that explodes": ({"target_modules": "((a{999}){999}){999}"}, "target_modules repeats"),
    "a pattern that does not close": ({"target_modules": "(a"}, "is no regular expression"),
    "a pattern without end": ({"target_modules": "a" * 5000}, "has 5000 characters"),
    "a layer that it does not name": ({"target_modules": ["k_proj"]}, "q_proj: adapter_config.json does not name it"),
    "a layer too few": ({"target_modules": ["q_proj", "k_proj"]}, "k_proj: adapter_config.json names it, and it has"),
    "a layer too many": ({"layers_to_transform": [0]}, "layers.1.self_attn.q_proj: adapter_config.json does not name"),
    "another rank": ({"rank_pattern": {"q_proj": 3}}, "the rank 3 want [3, 64]"),
    "layers of an expression": ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "needs target_modules"),
    "lists by an expression": ({"layers_to_transform": 0, "layers_pattern": "h|layers"}, "is no name of a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_not_computed_exactly_is_refused_by_its_key(
    case: str, base: Path, tmp_path: Path
) -> None:
    config, said = CONFIGS[case]
    adapters.write(tmp_path / "a", base, targets=("q_proj",), **config)
    assert said in refused(tmp_path / "a", base)


def test_what_is_off_or_was_only_for_training_is_read(base: Path, tmp_path: Path) -> None:
    off = {"use_warp": False, "warp_config": {}, "lora_dropout": 0.3, "init_lora_weights": "gaussian", "bias": "none"}
    adapters.write(tmp_path / "a", base, targets=("q_proj",), **off, eva_config={"rho": 2.0}, fan_in_fan_out=True)
    assert read(tmp_path / "a", base)


def _drop(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(key)


def _put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: value})


NAN = torch.full((4, 64), float("nan"))
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "a matrix is missing": (_drop(B), "lacks lora_B of model.layers.0.self_attn.q_proj"),
    "not a number": (_put(A, NAN), "lora_A.weight holds a number that is not finite"),
    "infinite": (_put(B, torch.full((64, 4), float("inf"))), "lora_B.weight holds a number that is not finite"),
    "too wide": (_put(A, torch.zeros(4, 65)), "has the shape [4, 65]; the layer and the rank 4 want [4, 64]"),
    "transposed": (_put(A, torch.zeros(64, 4)), "has the shape [64, 4]"),
    "one axis": (_put(B, torch.zeros(64)), "has the shape [64]"),
    "whole numbers": (_put(A, torch.zeros(4, 64, dtype=torch.int8)), "is of type 'I8'"),
    "twice as long": (_put(A, torch.zeros(4, 64, dtype=torch.float64)), "is of type 'F64'"),
    "of no layer": (_put(A.replace("q_proj", "z_proj"), torch.zeros(4, 64)), "the model has no layer 'model.layers.0"),
    "of a layer beyond the last": (_put(A.replace("s.0.", "s.7."), torch.zeros(4, 64)), "no layer 'model.layers.7"),
    "of a norm": (_put("base_model.model.model.norm.lora_A.weight", torch.zeros(4, 64)), "norm is a LlamaRMSNorm"),
    "of an embedding": (_put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 9)), "only lora_A"),
    "a magnitude": (_put(f"{PREFIX}.lora_magnitude_vector", torch.zeros(64)), "only lora_A and lora_B"),
    "a bias": (_put(f"{PREFIX}.lora_B.bias", torch.zeros(64)), "only lora_A and lora_B"),
    "a whole module": (_put("base_model.model.lm_head.weight", torch.zeros(448, 64)), "only lora_A and lora_B"),
    "without the prefix": (_put("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 64)), "only lora_A"),
    "nothing": (lambda tensors: tensors.clear(), "has 0 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_does_not_fit_is_refused_by_its_name(case: str, base: Path, tmp_path: Path) -> None:
    change, said = TENSORS[case]
    adapters.write(tmp_path / "a", base, targets=("q_proj",), change=change)
    assert said in refused(tmp_path / "a", base)


def test_files_that_lie_are_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a", base, targets=("q_proj",))
    config, weights = AdapterEntry(name="a", path=folder).files
    content, told = weights.read_bytes(), config.read_text()

    weights.write_bytes(content[:-7])
    assert "is cut short" in refused(folder, base)
    weights.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    assert "the header is longer than the file" in refused(folder, base)
    weights.write_bytes(pickle.dumps({"lora": 1}))
    assert "not a readable safetensors file" in refused(folder, base)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(print))
    assert "adapter_model.bin can run code when it is opened and is not loaded" in refused(folder, base)
    weights.write_bytes(content)
    for broken in ("", "[]", "{", "[" * 99_999, '{"r": ' + "9" * 5000 + "}", '{"r": 1, "r": 2}'):
        config.write_text(broken)
        assert refused(folder, base)
    config.write_text(told)
    assert read(folder, base)
    config.unlink()
    assert "no adapter in PEFT's format" in refused(folder, base)
    config.symlink_to("/etc/hostname")
    assert "outside the checkpoint's folder" in refused(folder, base)
    assert "does not exist" in refused(tmp_path / "b", base)


def test_an_adapter_of_another_model_is_refused(tiny: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "a", tiny("gpt2"), targets=adapters.TARGETS["gpt2"])
    assert "the adapter is another model's" in refused(tmp_path / "a", base)


def test_patterns_are_bounded_in_time() -> None:
    """Whoever writes an adapter writes its expressions: none of them keeps the server from starting."""
    with pytest.raises(BadPattern, match="takes more than"):
        matches("(?:a|aa)+b$", "a" * 60 + "c", "target_modules")


RANKS = {"q_proj": 2, r"^model\.layers\.1\.mlp\.up_proj": 6, "layers.0.mlp": 9}


@pytest.mark.parametrize(
    ("module", "rank"),
    [
        ("model.layers.0.self_attn.q_proj", 2),
        ("model.layers.1.mlp.up_proj", 6),
        ("model.layers.0.mlp.up_proj", 4),  # the end of a name, not its middle
        ("model.layers.0.self_attn.xq_proj", 4),
    ],
)
def test_patterns_match_as_pefts_do(module: str, rank: int) -> None:
    assert first_match(RANKS, module, 4, "rank_pattern") == rank


# -- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [False, True])
def test_each_layer_has_its_own_rank_and_scale(root: bool, base: Path, tmp_path: Path) -> None:
    adapters.write(
        tmp_path / "a",
        base,
        targets=("q_proj", "down_proj"),
        ranks=lambda name: 2 if name.endswith("q_proj") else 4,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 12},
        use_rslora=root,
    )
    pairs = read(tmp_path / "a", base).pairs  # type: ignore[union-attr]
    expected = {
        "model.layers.0.self_attn.q_proj": (2, 8),
        "model.layers.1.self_attn.q_proj": (2, 8),
        "model.layers.0.mlp.down_proj": (4, 8),
        "model.layers.1.mlp.down_proj": (4, 12),
    }
    assert {name: (pair.rank, pair.scale) for name, pair in pairs.items()} == {
        name: (rank, alpha / (rank**0.5 if root else rank)) for name, (rank, alpha) in expected.items()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_oss"])
def test_merged_weights_are_the_formula(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """W + α/r · B A, in float32, also where a layer keeps its weight transposed; nothing else is touched."""
    folder = tiny(family)
    adapters.write(tmp_path / "a", folder, targets=adapters.TARGETS.get(family, adapters.ALL))
    adapter = read(tmp_path / "a", folder)
    assert isinstance(adapter, Adapter)
    before, after = plain(folder), plain(folder)
    merge(after, adapter, "m")
    changed = 0
    for (name, old), (_, new) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        pair = adapter.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is None:
            assert torch.equal(old, new), name
            continue
        delta = (pair.b.double() @ pair.a.double()) * 2.0
        delta = delta.T if family == "gpt2" else delta
        assert torch.allclose(new.double(), old.double() + delta, rtol=1e-6, atol=1e-6)
        changed += 1
    assert changed == len(adapter.pairs)


def test_a_weight_that_two_modules_share_is_not_merged_into(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny("qwen3")  # its output layer is its embedding
    adapters.write(tmp_path / "a", folder, targets=("lm_head",))
    adapter = read(tmp_path / "a", folder)
    assert isinstance(adapter, Adapter)
    with pytest.raises(LoadError, match=r"lm_head shares its weight with model\.embed_tokens"):
        merge(plain(folder), adapter, "m")


def test_merging_beyond_a_dtypes_numbers_is_refused(base: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "a", base, targets=("q_proj",), scale=200.0)
    adapter = read(tmp_path / "a", base)
    assert isinstance(adapter, Adapter)
    with pytest.raises(LoadError, match=r"numbers beyond those of torch\.float16"):
        merge(plain(base).to(torch.float16), adapter, "m")


def test_no_adapter_is_computed_beside_the_layer_that_makes_the_logits(base: Path, tmp_path: Path) -> None:
    adapters.write(tmp_path / "a", base, targets=("lm_head",))
    adapter = read(tmp_path / "a", base)
    assert isinstance(adapter, Adapter)
    with pytest.raises(LoadError, match="lm_head makes the logits"):
        places_of(plain(base), [adapter], "m")


def test_a_layer_that_sees_only_some_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    """An expert's rows are not those of the step: nobody could say which of them are the adapter's."""
    adapters.write(tmp_path / "a", base, targets=("up_proj",))
    adapter = read(tmp_path / "a", base)
    assert isinstance(adapter, Adapter)
    model = plain(base)
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:, :3]), whole(x[:, 3:])], 1)
    tokens = torch.arange(3, 12)[None]
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.up_proj is not computed once for every token"):
        with torch.inference_mode(), computed_plainly(model, adapter, "m"):
            model(tokens)


def test_as_the_real_peft_computes(base: Path, tmp_path: Path) -> None:
    """Numbers that PEFT 0.21.2 gave for an adapter it wrote itself: `golden/peft.json` says with what."""
    golden = json.loads((Path(__file__).parent / "golden" / "peft.json").read_text())
    folder = Path(__file__).parent / "golden"
    assert golden["adapter"] == "peft"
    adapter = read(folder / golden["adapter"], base)
    assert isinstance(adapter, Adapter)
    tokens = torch.tensor([golden["tokens"]])
    beside, merged = plain(base), plain(base)
    with torch.inference_mode(), computed_plainly(beside, adapter, "m"):
        logits = beside(tokens).logits[0]
    merge(merged, adapter, "m")
    with torch.inference_mode():
        again = merged(tokens).logits[0]
    for mine, theirs in ((logits, golden["beside"]), (again, golden["merged"])):
        expected = torch.tensor(theirs)
        assert torch.allclose(mine[-1, : len(expected)], expected, rtol=1e-4, atol=1e-4)

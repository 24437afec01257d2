"""GGUF files: their own tokenizer, template and end tokens; the bits of the checkpoint they came from, or a refusal."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.gguf_reader import GGUFReader, ReaderField
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from engine import LLM, LoadError, ModelConfig
from engine.checkpoints import gguf_file, gguf_model
from engine.loading.loader import load
from engine.types.messages import ChatMessage
from tests import tiny_models
from tests.engine.gguf_files import KNOWN_TOKENS, Extra, header_only, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What transformers makes of a Qwen3 GGUF file: it reads no head dimension, and takes 128."""
    return tiny_models.write(tmp_path / "folder", "qwen3", head_dim=128, vocab_size=KNOWN_TOKENS)


@pytest.fixture(scope="module")
def header(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A file, and how many of its bytes come before the tensors."""
    file = write(tiny("qwen3"), tmp_path_factory.mktemp("gguf") / "model.gguf")
    return file.read_bytes(), int(GGUFReader(file).data_offset)


def _bits(model: Path | LLM) -> tuple[Any, ...]:
    llm = model if isinstance(model, LLM) else LLM(model)
    [reply] = llm.generate("Hello, how are you?", max_tokens=12, temperature=0.0, logprobs=True, ignore_eos=True)
    return reply.token_ids, tuple(t.logprob for t in reply.logprobs or ())


def test_a_gguf_file_gives_the_bits_of_the_checkpoint_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    file = write(folder, tmp_path / "model.gguf")
    theirs, ours = LLM(file), LLM(folder)
    assert theirs.info.id == "model"
    assert theirs.info.context_length == ours.info.context_length
    assert theirs.info.law.holds, theirs.info.law.reason
    assert theirs.info.system_fingerprint != ours.info.system_fingerprint
    assert _bits(theirs) == _bits(ours)
    asked = [ChatMessage("user", "Hello 123")]
    [one], [other] = (llm.generate(asked, max_tokens=4, temperature=0.0, seed=1) for llm in (theirs, ours))
    assert one == other


def test_what_lies_beside_a_file_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder of downloads holds other models' files: they change no token, and no code of theirs is offered."""
    file = write(folder, tmp_path / "model.gguf")
    before = load(ModelConfig(id="m", path=file))
    auto = {
        "AutoTokenizer": [None, "code.Tokenizer"],
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
    }
    others: dict[str, Any] = {
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "auto_map": auto, "bos_token": "[CLS]"},
        "config.json": {"model_type": "bert", "auto_map": auto},
        "special_tokens_map.json": {"eos_token": "[SEP]"},
        "added_tokens.json": {"hello": 5},
        "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "somebody/else"},
    }
    for name, content in others.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "code.py").write_text("print('code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    after = load(ModelConfig(id="m", path=file, trust_remote_code=True))
    assert "code ran" not in capfd.readouterr().out
    assert after.tokenizer("hello you")["input_ids"] == before.tokenizer("hello you")["input_ids"]
    assert after.end_ids == before.end_ids
    assert after.info.system_fingerprint == before.info.system_fingerprint


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("lfm2", "rope.scaling.type", "yarn"),
        ("qwen35", "attention.scale", 0.5),
        ("qwen35moe", "rope.scaling.factor", 4),
    ],
)
def test_architectures_that_transformers_reads_anew_skip_no_scale(
    architecture: str, key: str, value: Any, tiny: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    gguf_model.complete_model(header_only(architecture), model, "m")
    with pytest.raises(LoadError, match=rf"{key} = {value}, which transformers does not read"):
        gguf_model.complete_model(header_only(architecture, **{f"{architecture}.{key}": value}), model, "m")


@pytest.mark.parametrize(("heads", "hidden", "scalar"), [(32, 4608, 144), (16, 3584, 256), (8, 2304, 256)])
def test_each_gemma_2_scales_its_scores_by_its_own_number(heads: int, hidden: int, scalar: int) -> None:
    """No key says it; 27B has another one than transformers' default, and would answer worse without a word."""
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": 1, "vocab_size": 8}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes))
    gguf_model.complete_model(header_only("gemma2"), model, "m")
    assert model.model.layers[0].self_attn.scaling == scalar**-0.5
    assert model.config.query_pre_attn_scalar == scalar


def test_a_header_that_would_take_all_memory_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array of bytes is small in a file; each entry becomes an object."""
    file = write(folder, tmp_path / "model.gguf", extra=lambda w: w.add_array("x.bytes", list(range(200)) * 20))
    gguf_file.open_file(file, "m")
    monkeypatch.setattr(gguf_file, "_MOST_ENTRIES", 4000)
    with pytest.raises(LoadError, match=r"model\.gguf .*its arrays have \d+ entries; more than 4000 are not read"):
        gguf_file.open_file(file, "m")
    head = file.read_bytes()
    file.write_bytes(head[:16] + (1 << 40).to_bytes(8, "little") + head[24:])
    with pytest.raises(LoadError, match=r"has 1099511627776 keys"):
        gguf_file.open_file(file, "m")


def _key(order: str, kind: int, value: bytes) -> bytes:
    return struct.pack(f"{order}4sIQQQ", b"GGUF", 3, 0, 1, 1) + b"x" + struct.pack(f"{order}I", kind) + value


HEADERS = {
    "for another kind of machine": (_key(">", 9, struct.pack(">IQ", 0, 1 << 40)), "high byte first"),
    "an array of arrays": (_key("<", 9, struct.pack("<IQ", 9, 9) + bytes(200)), "arrays within arrays"),
    "a long array of arrays": (_key("<", 9, struct.pack("<IQ", 9, 1 << 40)), "1099511627776 entries"),
    "a long array of texts": (_key("<", 9, struct.pack("<IQ", 8, 1 << 20)), "array is longer than the file"),
    "a long text in an array": (_key("<", 9, struct.pack("<IQQ", 8, 1, 1 << 63)), "string is longer than the file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused_at_once(case: str, tmp_path: Path) -> None:
    """For machines that put the high byte first, too: gguf would read such an array without end, numbers as others."""
    data, words = HEADERS[case]
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(LoadError, match=rf"model\.gguf is not a readable GGUF file .*{words}"):
        gguf_file.open_file(tmp_path / "model.gguf", "m")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_named(share: float, folder: Path, tmp_path: Path) -> None:
    file = write(folder, tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(LoadError, match=r"model\.gguf is (not a readable GGUF file|cut short)"):
        load(ModelConfig(id="m", path=file))


def test_a_gguf_file_that_transformers_misreads_is_not_served(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Its reader knows no head dimension of Qwen3: the shapes are not those of the model that it makes."""
    file = write(tiny("qwen3"), tmp_path / "model.gguf")
    with pytest.raises(LoadError, match=r"k_norm\.weight has the shape \[16\].*Qwen3ForCausalLM .*\[128\]"):
        load(ModelConfig(id="m", path=file))


def test_a_gguf_file_without_its_package_is_refused_with_the_name_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match=r"needs the package gguf: pip install 'gguf>=0\.16,<0\.20'"):
        load(ModelConfig(id="m", path=tmp_path / "model.gguf"))


def test_an_old_package_is_no_damage_of_the_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(folder, tmp_path / "model.gguf")
    monkeypatch.delattr(ReaderField, "contents")
    with pytest.raises(LoadError, match=r"needs the package gguf: pip install 'gguf>=0\.16"):
        load(ModelConfig(id="m", path=file))


def test_the_header_is_read_as_gguf_reads_it(folder: Path, tmp_path: Path) -> None:
    """The reader that takes a second instead of half a minute gives the same values, and is given back."""
    file = write(
        folder,
        tmp_path / "model.gguf",
        extra=lambda w: (w.add_array("general.tags", ["a", "漢"]), w.add_array("x.numbers", [0.5, -1.0])),
    )
    slow = GGUFReader(file)
    read = gguf_file.open_file(file, "m")
    assert read.metadata == {key: field.contents() for key, field in slow.fields.items()}
    assert read.sizes == {tensor.name: tensor.n_elements for tensor in slow.tensors}
    with gguf_file.fast_reading():
        assert gguf.GGUFReader is not GGUFReader
        fast = gguf.GGUFReader(file)
    assert gguf.GGUFReader is GGUFReader
    for one, other in zip(fast.tensors, slow.tensors, strict=True):
        assert np.array_equal(one.data, other.data)


def test_llamas_scaled_frequencies_are_applied(tmp_path: Path) -> None:
    """llama.cpp stores Llama 3.1's scaling as a tensor, which transformers drops: every position would be wrong."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    folder = tiny_models.write(tmp_path / "folder", "llama", rope_parameters=rope, vocab_size=KNOWN_TOKENS)
    rotary = LLM(folder).engine.model.runner._model.model.model.rotary_emb  # type: ignore[attr-defined]
    unscaled = 1e4 ** (-np.arange(0, 16, 2, dtype=np.float64) / 16)
    factors = (unscaled / rotary.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 4  # the scaling is there, and a file without it is another model
    scaled = write(folder, tmp_path / "scaled.gguf", extra=lambda w: w.add_tensor("rope_freqs.weight", factors))
    plain = write(folder, tmp_path / "plain.gguf")
    (ids, logprobs), (_, others) = _bits(folder), _bits(plain)
    assert logprobs != pytest.approx(others, abs=1e-3)
    assert _bits(scaled)[0] == ids
    assert _bits(scaled)[1] == pytest.approx(logprobs, abs=1e-4)


def test_a_llama_without_the_number_of_its_key_heads_is_refused(tiny: Callable[[str], Path]) -> None:
    """llama.cpp takes that of all heads; transformers then leaves queries and keys as llama.cpp rotates them."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with pytest.raises(LoadError, match=r"lacks llama\.attention\.head_count_kv"):
        gguf_model.complete_model(header_only("llama", llama__attention__head_count=4), model, "m")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=4))
def test_any_damage_of_a_header_is_a_load_error(
    flips: list[tuple[float, int]], tmp_path: Path, header: tuple[bytes, int]
) -> None:
    """Lengths in the file are what it says, not what it has: none may take all memory or end in an error of numpy."""
    content, size = bytearray(header[0]), header[1]
    for share, change in flips:
        content[int(share * size)] ^= change
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with contextlib.suppress(LoadError):  # anything else fails the test
        gguf_file.inspect(gguf_file.open_file(file, "m"))


REFUSED: dict[str, tuple[Extra, str]] = {
    "a bias": (
        lambda w: w.add_tensor("blk.1.attn_q.bias", np.ones(512, dtype=np.float32)),
        r"holds blk\.1\.attn_q\.bias, which transformers does not read",
    ),
    "half of a head rotated": (
        lambda w: w.add_rope_dimension_count(64),
        r"qwen3\.rope\.dimension_count = 64, which transformers does not read",
    ),
    "scaled positions": (
        lambda w: w.add_string("qwen3.rope.scaling.type", "yarn"),
        r"says qwen3\.rope\.scaling\.type = yarn, which transformers does not read",
    ),
    "another head": (lambda w: w.add_key_length(64), r"says qwen3\.attention\.key_length = 64"),
    "a key that nobody knows": (lambda w: w.add_float32("qwen3.residual_scale", 0.5), r"qwen3\.residual_scale = 0\.5"),
    "long factors": (
        lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, dtype=np.float32)),
        r"holds rope_factors_long\.weight",
    ),
    "frequencies that do not fit": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, dtype=np.float32)),
        r"holds rope_freqs\.weight",
    ),
    "a part": (lambda w: w.add_uint16("split.count", 3), r"one of 3 parts.*llama-gguf-split --merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_skip_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    extra, message = REFUSED[case]
    file = write(folder, tmp_path / "model.gguf", extra=extra)
    with pytest.raises(LoadError, match=message):
        load(ModelConfig(id="m", path=file))


def test_what_says_nothing_new_is_no_reason(folder: Path, tmp_path: Path) -> None:
    file = write(
        folder,
        tmp_path / "model.gguf",
        extra=lambda w: (
            w.add_key_length(128),
            w.add_value_length(128),
            w.add_rope_dimension_count(128),
            w.add_vocab_size(KNOWN_TOKENS),
        ),
    )
    assert _bits(file) == _bits(folder)

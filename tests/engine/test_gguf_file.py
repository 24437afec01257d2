"""GGUF files: their own tokenizer, template and end tokens; the bits of the checkpoint they came from, or a refusal."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.gguf_reader import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine import LLM, LoadError, ModelConfig, gguf_file
from engine.loader import load
from engine.types import ChatMessage
from tests import tiny_models

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}
_KNOWN_TOKENS = 440  # what the tokenizer of tiny models has
Extra = Callable[[Any], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What transformers makes of a Qwen3 GGUF file: it reads no head dimension, and takes 128."""
    return tiny_models.write(tmp_path / "folder", "qwen3", head_dim=128, vocab_size=_KNOWN_TOKENS)


def _byte_level(writer: Any, folder: Path, pre: str | None) -> None:
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    special = {t["content"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 5 if token.startswith("[PAD") else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])


_PIECES = ("▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "llo", "hello", "▁hello", "wo", "ld", "rld", "world")
_SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES]


def _sentencepiece(writer: Any, folder: Path, pre: str | None) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_SENTENCEPIECE)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(_PIECES))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(_PIECES))
    writer.add_bos_token_id(1)


def _write(
    folder: Path,
    file: Path,
    *,
    pre: str | None = "gpt-2",
    vocabulary: Callable[[Any, Path, str | None], None] = _byte_level,
    extra: Extra = lambda writer: None,
) -> Path:
    """What llama.cpp's converter makes of a folder, as far as these tests need it."""
    config = json.loads((folder / "config.json").read_text())
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, config["model_type"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    vocabulary(writer, folder, pre)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    extra(writer)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else key_heads  # llama.cpp rotates neighbours, not halves
            halves = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        for theirs, short in _NAMES.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def header(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A file, and how many of its bytes come before the tensors."""
    file = _write(tiny("qwen3"), tmp_path_factory.mktemp("gguf") / "model.gguf")
    return file.read_bytes(), int(GGUFReader(file).data_offset)


def _bits(model: Path | LLM) -> tuple[Any, ...]:
    llm = model if isinstance(model, LLM) else LLM(model)
    [reply] = llm.generate("Hello, how are you?", max_tokens=12, temperature=0.0, logprobs=True, ignore_eos=True)
    return reply.token_ids, tuple(t.logprob for t in reply.logprobs or ())


def test_a_gguf_file_gives_the_bits_of_the_checkpoint_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    file = _write(folder, tmp_path / "model.gguf")
    theirs, ours = LLM(file), LLM(folder)
    assert theirs.info.id == "model"
    assert theirs.info.context_length == ours.info.context_length
    assert theirs.info.law.holds, theirs.info.law.reason
    assert theirs.info.system_fingerprint != ours.info.system_fingerprint
    assert _bits(theirs) == _bits(ours)
    asked = [ChatMessage("user", "Hello 123")]
    [one], [other] = (llm.generate(asked, max_tokens=4, temperature=0.0, seed=1) for llm in (theirs, ours))
    assert one == other


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_named(share: float, folder: Path, tmp_path: Path) -> None:
    file = _write(folder, tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(LoadError, match=r"model\.gguf is (not a readable GGUF file|cut short)"):
        load(ModelConfig(id="m", path=file))


def test_a_gguf_file_that_transformers_misreads_is_not_served(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Its reader knows no head dimension of Qwen3: the shapes are not those of the model that it makes."""
    file = _write(tiny("qwen3"), tmp_path / "model.gguf")
    with pytest.raises(LoadError, match=r"k_norm\.weight has the shape \[16\].*Qwen3ForCausalLM .*\[128\]"):
        load(ModelConfig(id="m", path=file))


def test_a_gguf_file_without_its_package_is_refused_with_the_name_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match=r"needs the package gguf: pip install gguf"):
        load(ModelConfig(id="m", path=tmp_path / "model.gguf"))


def test_the_header_is_read_as_gguf_reads_it(folder: Path, tmp_path: Path) -> None:
    """The reader that takes a second instead of half a minute gives the same values, and is given back."""
    file = _write(
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


def test_all_end_tokens_and_templates_of_a_file_count(folder: Path, tmp_path: Path) -> None:
    tool_use = "TOOLS {{ tools[0].function.name }}: {{ messages[-1].content }}"
    file = _write(
        folder,
        tmp_path / "model.gguf",
        extra=lambda w: (w.add_eot_token_id(7), w.add_string("tokenizer.chat_template.tool_use", tool_use)),
    )
    loaded = load(ModelConfig(id="m", path=file))
    assert loaded.end_ids == (2, 7)
    assert loaded.template.source == (folder / "chat_template.jinja").read_text()
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    assert loaded.template.render([ChatMessage("user", "Hi")], tools=[tool]) == "TOOLS look: Hi"


def test_llamas_scaled_frequencies_are_applied(tmp_path: Path) -> None:
    """llama.cpp stores Llama 3.1's scaling as a tensor, which transformers drops: every position would be wrong."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    folder = tiny_models.write(tmp_path / "folder", "llama", rope_parameters=rope, vocab_size=_KNOWN_TOKENS)
    rotary = LLM(folder)._model.runner._model.model.model.rotary_emb  # type: ignore[attr-defined]
    unscaled = 1e4 ** (-np.arange(0, 16, 2, dtype=np.float64) / 16)
    factors = (unscaled / rotary.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 4  # the scaling is there, and a file without it is another model
    scaled = _write(folder, tmp_path / "scaled.gguf", extra=lambda w: w.add_tensor("rope_freqs.weight", factors))
    plain = _write(folder, tmp_path / "plain.gguf")
    (ids, logprobs), (_, others) = _bits(folder), _bits(plain)
    assert logprobs != pytest.approx(others, abs=1e-3)
    assert _bits(scaled)[0] == ids
    assert _bits(scaled)[1] == pytest.approx(logprobs, abs=1e-4)


def test_a_sentencepiece_vocabulary_is_read_with_its_scores_and_its_first_token(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "folder", "llama", vocab_size=len(_SENTENCEPIECE))
    llm = LLM(_write(folder, tmp_path / "model.gguf", vocabulary=_sentencepiece))
    names = llm._model.tokenizer.convert_ids_to_tokens(llm._model.tokenizer("hello world é")["input_ids"])
    assert names == ["<s>", "▁hello", "▁", "world", "▁", "<0xC3>", "<0xA9>"]
    [reply] = llm.generate("hello world", max_tokens=16, seed=1, ignore_eos=True)
    assert reply.usage.prompt_tokens == 4
    assert reply.text.count("world") == reply.token_ids.count(_SENTENCEPIECE.index("world"))
    [chat] = llm.generate([ChatMessage("user", "hello")], max_tokens=1, seed=1)
    prompt = llm._model.template.render([ChatMessage("user", "hello")])
    assert chat.usage.prompt_tokens == len(llm._model.tokenizer(prompt, add_special_tokens=False)["input_ids"])


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
    file = _write(folder, tmp_path / "model.gguf", extra=extra)
    with pytest.raises(LoadError, match=message):
        load(ModelConfig(id="m", path=file))


def test_what_says_nothing_new_is_no_reason(folder: Path, tmp_path: Path) -> None:
    file = _write(
        folder,
        tmp_path / "model.gguf",
        extra=lambda w: (w.add_key_length(128), w.add_value_length(128), w.add_vocab_size(_KNOWN_TOKENS)),
    )
    assert _bits(file) == _bits(folder)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["in", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["in", "Ġ", "123", "4"]),
        ("gpt-2", ["in", "Ġ1234"]),
        ("default", ["in", "Ġ1234"]),
        (None, ["in", "Ġ1234"]),
    ],
)
def test_text_is_split_as_the_file_says(
    pre: str | None, pieces: list[str], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another split gives other tokens than in training, and worse replies that nobody can explain."""
    file = _write(folder, tmp_path / "model.gguf", pre=pre)
    with caplog.at_level(logging.WARNING, "verbatim.engine"):
        tokenizer = load(ModelConfig(id="m", path=file)).tokenizer
    assert [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1234")] == pieces
    assert ("does not say how text is split" in caplog.text) == (pre in (None, "default"))


def test_a_split_that_is_not_known_is_refused(folder: Path, tmp_path: Path) -> None:
    file = _write(folder, tmp_path / "model.gguf", pre="deepseek-v9")
    with pytest.raises(LoadError, match=r"splits text the way 'deepseek-v9'"):
        load(ModelConfig(id="m", path=file))

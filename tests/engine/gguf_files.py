"""GGUF files of tiny checkpoints, as llama.cpp's converter writes them, for the tests that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from engine.checkpoints import gguf_file

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
KNOWN_TOKENS = 440  # what the tokenizer of tiny models has
Extra = Callable[[Any], object]


def byte_level(writer: Any, folder: Path, pre: str | None) -> None:
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
SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES]


def sentencepiece(writer: Any, folder: Path, pre: str | None) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SENTENCEPIECE)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(_PIECES))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(_PIECES))
    writer.add_bos_token_id(1)


def write(
    folder: Path,
    file: Path,
    *,
    pre: str | None = "gpt-2",
    vocabulary: Callable[[Any, Path, str | None], None] = byte_level,
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


def header_only(architecture: str, **metadata: Any) -> gguf_file.GGUFFile:
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    return gguf_file.GGUFFile(Path("m.gguf"), {"general.architecture": architecture, **keys}, {}, {}, 0)

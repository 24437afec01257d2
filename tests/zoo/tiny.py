"""Tiny checkpoints with random weights of every architecture that the installed transformers calls a causal LM.

`NAMES` lists them: the model types of transformers' causal mapping and our own `VARIANTS` of some. Each one's config is
derived from its class's defaults: fields of a known meaning are made small (`SMALL`), lists over layers are cut so that
every kind of layer is there, and thresholds (windows, chunks, original contexts) come so near that a prompt of 600
tokens crosses them. `OVERRIDES` says where that is not enough, and why.

Weights are drawn by the parameter's name, so large that logits depend on the past. Knows nothing of the engine.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo.overrides import ENCODERS, OVERRIDES, VARIANTS

VOCABULARY = 320
LAYERS = 4
WINDOW = 24
"""Tokens that a sliding layer sees; the long prompt crosses it many times."""
ORIGINAL_CONTEXT = 64
"""What scaled rotary embeddings were trained for, so that both prompts lie on different sides of it."""

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
NAMES: tuple[str, ...] = MODEL_TYPES + tuple(name for name in VARIANTS if VARIANTS[name][0] in MODEL_TYPES)

_BY_SIZE: tuple[tuple[int, str], ...] = (
    (
        64,
        "hidden_size n_embd d_model emb_dim embedding_dim embedding_size lru_width word_embed_proj_dim "
        "attention_hidden_size input_embedding_size output_embedding_size ple_embed_dim max_source_positions",
    ),
    (
        96,
        "intermediate_size dense_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size "
        "intermediate_size_mlp feed_forward_size d_inner",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size kv_lora_rank "
        "shared_experts_intermediate_size shared_intermediate_size expert_ffn_hidden_size o_lora_rank q_lora_rank "
        "router_hidden_size adapter_rank hc_lowrank loop_gate_rank attention_chunk_size mamba_chunk_size chunk_size "
        "index_block_size moe_latent_size",
    ),
    (
        16,
        "head_dim kv_channels attention_head_size swa_head_dim dim_head attention_head_dim qk_nope_head_dim v_head_dim "
        "mamba_d_state mamba_d_head mamba_head_dim mamba_headdim ssm_state_size state_size linear_key_head_dim "
        "linear_value_head_dim linear_head_dim hidden_size_per_layer_input index_head_dim index_topk d_rel laurel_rank "
        "gated_norm_rank block_size d_head mamba_dt_rank time_step_rank index_n_heads",
    ),
    (8, "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads"),
    (
        4,
        "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads "
        "linear_num_heads zero_expert_num index_topk_blocks num_query_groups",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
        "num_experts_per_token moe_k moe_topk top_k_experts n_group num_expert_group mamba_n_groups mamba_ngroups "
        "n_groups o_groups num_kv_shared_layers hc_count hc_mult rescale_every num_layers_per_stack num_blocks",
    ),
    (
        1,
        "topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers "
        "num_encoder_layers",
    ),
    (WINDOW, "sliding_window sliding_window_size attention_window_size window_size"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (
        2048,
        "max_position_embeddings n_positions max_target_positions max_seq_len n_ctx context_length model_max_length",
    ),
)
SMALL: dict[str, int] = {field: size for size, fields in _BY_SIZE for field in fields.split()}
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""As many as people run, up to 64, and 32 for more: how many rows a router has decides how it is computed."""
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
"""One entry for each layer. (Those that a class derives from a number of layers follow by themselves.)"""


def tiny_config(name: str) -> PreTrainedConfig:
    """The config of a model type or of a variant."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    given = {**OVERRIDES.get(model_type, {}), **changes}
    if model_type in ENCODERS:
        given = {"is_decoder": True, **given}
    return _small(CONFIG_MAPPING[model_type], given)


def _small(kind: type[PreTrainedConfig], given: dict[str, Any]) -> PreTrainedConfig:
    try:
        defaults = kind()
    except Exception:  # the defaults of a few contradict each other
        defaults = kind(**given)
    children: dict[str, Any] = {}
    for key in getattr(kind, "sub_configs", {}):
        part = getattr(defaults, key, None)
        if isinstance(part, PreTrainedConfig):
            children[key] = _small(type(part), {**OVERRIDES.get(part.model_type, {}), **given.get(key, {})})
    fields = {key: value for key, value in _shrunk(defaults.to_dict()).items() if key not in given}
    plain = {key: value for key, value in given.items() if key not in children}
    return kind(**{**fields, **children, **plain})


def _shrunk(defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that have to change, by their names."""
    fields: dict[str, Any] = {}
    for key, value in defaults.items():
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if (key in SMALL and number) or (key == "head_dim" and value is None):
            fields[key] = SMALL[key]
        elif key in SMALL and isinstance(value, list) and all(isinstance(size, int) for size in value):
            fields[key] = [SMALL[key]] * LAYERS  # one for each layer
        elif key in _EXPERTS and number and value > 64:
            fields[key] = 32
        elif key in _TOKENS and value is not None:
            fields[key] = _TOKENS[key]
        elif key.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            fields[key] = VOCABULARY - 1 - len(fields) % 20
        elif key in _LISTS and value:
            fields[key] = _kinds(value)
        elif key == "rope_parameters" and value:
            fields[key] = _near(value)
    if "kv_lora_rank" in defaults and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = SMALL["num_attention_heads"]  # latent attention has no groups
    if "kv_lora_rank" in defaults and defaults.get("head_dim") == defaults.get("qk_rope_head_dim"):
        fields["head_dim"] = SMALL["qk_rope_head_dim"]
    if "qk_head_dim" in defaults:
        fields["qk_head_dim"] = SMALL["qk_nope_head_dim"] + SMALL["qk_rope_head_dim"]
    return fields


def _kinds(values: list[Any]) -> list[Any]:
    """`LAYERS` entries that show every kind in the order of their first appearance; the last kind twice at least."""
    kinds = list(dict.fromkeys(values))
    return [kinds[i % len(kinds)] for i in range(max(LAYERS, len(kinds)))][:LAYERS] if len(kinds) <= LAYERS else kinds


def _near(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose original context, if there is one, the long prompt leaves."""
    rope = copy.deepcopy(rope)
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if part.get("original_max_position_embeddings"):
            part["original_max_position_embeddings"] = ORIGINAL_CONTEXT
    return rope


# -- weights ---------------------------------------------------------------------------------------------------------

_KEEP = ("A_log", "dt_bias", ".D", "time_decay", "time_first", "inv_freq", "lambda_", "rotary", "beta", "position_ids")
"""Parameters whose first values have a meaning that noise would spoil."""


_SIZES = (
    (0.3, 1.5, 1.5),
    (0.05, 1.5, 1.5),
    (1.0, 1.5, 1.5),
    (0.5, 4.0, 1.0),
    (0.5, 4.0, 0.4),
    (0.1, 6.0, 0.4),
    (0.3, 8.0, 8.0),
    (1.5, 8.0, 0.5),
)
"""Spread of embeddings, of attention's matrices and of all others: the first that makes a model lively is taken."""


def build(name: str, config: PreTrainedConfig | None = None) -> nn.Module:
    """The model, float32, with its own attention; the same weights every time."""
    with torch.random.fork_rng(devices=[]):  # what is kept of the first values is the same every time, too
        torch.manual_seed(20)
        # What people have of these is a model that sees; their class for text alone does not load its own checkpoint.
        kind = AutoModelForImageTextToText if name in ("emu3", "mllama") else AutoModelForCausalLM
        model: nn.Module = kind.from_config(config or tiny_config(name), dtype=torch.float32)
    model.eval().requires_grad_(False)
    found = []
    for sizes in _SIZES:
        _fill(model, *sizes)
        found.append(liveliness(model))
        if found[-1] >= 0.5:
            return model
    _fill(model, *_SIZES[found.index(max(found))])
    return model


def liveliness(model: nn.Module) -> float:
    """How much the likeliest token says of the context, 0 to 1: a model that always repeats itself is never wrong.

    The share of places in a prompt at which another token is the likeliest when only the last token is seen; and less
    if few different tokens are ever the likeliest.
    """
    length, places = 160, range(60, 160, 10)
    ids = torch.tensor([prompt(length)])
    try:
        with torch.inference_mode():
            whole = model(ids, use_cache=False).logits[0].argmax(-1)
            alone = [model(ids[:, i : i + 1], use_cache=False).logits[0, -1].argmax() for i in places]
    except Exception:  # some models are never called this way; what they do is found out where they are examined
        return 1.0
    differ = sum(int(whole[i] != last) for i, last in zip(places, alone, strict=True)) / len(places)
    return min(differ, 3 * len(whole.unique()) / length)


@torch.no_grad()
def _fill(model: nn.Module, embedding: float, attention: float, other: float) -> None:
    """Matrices get noise that keeps a row's size about; vectors stay near what they began with."""
    if not hasattr(model, "zoo_first"):
        object.__setattr__(model, "zoo_first", {k: p.clone() for k, p in model.named_parameters() if _stays(k, p)})
    for key, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = _noise(key, parameter.shape)
        if _stays(key, parameter):
            first = model.zoo_first[key]  # type: ignore[index,operator]
            parameter.copy_(torch.where(first.isfinite(), first, 0) + noise * 0.1)
        elif "conv" in key and parameter.dim() == 3:
            parameter.copy_(noise * 0.5)
        elif "embed" in key or "wte" in key or "wpe" in key:
            parameter.copy_(noise * embedding)
        else:
            gain = attention if "attn" in key or "attention" in key else other
            parameter.copy_(noise * (gain / math.sqrt(max(parameter.shape[-2:]))))
    for key, buffer in model.named_buffers():
        if key.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.copy_(_noise(key, buffer.shape) * 0.1)


def _stays(key: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() < 2 or any(part in key for part in _KEEP)


def _noise(key: str, shape: Iterable[int]) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


# -- a checkpoint ----------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, three special tokens, and words that nobody writes: as many tokens as the model has rows."""
    special = ["<|pad|>", "<|begin|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.add_tokens([f"word{i}" for i in range(VOCABULARY - len(special) - len(alphabet))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")


def write(folder: Path, name: str) -> nn.Module:
    """Write a checkpoint into `folder` and return the model that is in it."""
    model = build(name)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def prompt(length: int, start: int = 0) -> tuple[int, ...]:
    """Tokens of plain bytes, all of them different enough that no two stretches are alike."""
    return tuple(10 + zlib.crc32(f"{start}/{i}".encode()) % 240 for i in range(length))

"""What the general way of making configs small does not know, with the reasons; and variants of architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ENCODERS: frozenset[str] = frozenset(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split()
)
"""Encoders that are decoders only when told so."""

OTHER: frozenset[str] = frozenset(
    "dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 "
    "llama4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe "
    "qwen4_exp trocr whisper".split()
)
"""Models of images or sound, or parts of one, that are in the causal mapping beside the decoders of text."""

_MIXED = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 24}
_ASSISTANT = {
    "num_hidden_layers": 4,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 4,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 16, "moe_top_k": 4},
    },
    # Defaults that leave out what the published ones have.
    "dots1": {"n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 32},
    "bamba": {"attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen2": _MIXED | {"max_window_layers": 2},
    "qwen2_moe": {"max_window_layers": 2},
    "qwen3": {"max_window_layers": 2},
    # Ratios of sizes.
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "time_step_min": 1e-9},
    # For these two transformers holds time steps above `time_step_min` in a whole pass, and not in a cached step of one
    # token: its own two ways differ by up to 0.014 in a log-probability where a step is below 0.001.
    "nemotron_h": {"time_step_min": 1e-9},
    "zaya": {"num_experts_per_tok": 1},
    "roc_bert": {
        "shape_vocab_size": 320,
        "pronunciation_vocab_size": 320,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "gemma4_text": {"per_layer_config": {"01": {"head_dim": 32}, "03": {"head_dim": 32}}},
    "gemma4_unified_text": {"per_layer_config": {"01": {"head_dim": 32}, "03": {"head_dim": 32}}},
    "dots3_note_text": {
        "head_dim": 24,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "per_layer_config": {
            layer: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 48} for layer in ("01", "03")
        },
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "nemotron": {"num_key_value_heads": 2},
    "blt": {
        "encoder_hash_byte_group_vocab": 512,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "minicpm3": {"dim_model_base": 64, "scale_emb": 1},
    "xmod": {"default_language": "en_XX"},
    # Past the window the keys with the highest scores are seen, and in the first layer equal tokens have equal scores:
    # one pass and many break such ties differently, so transformers has no one answer there.
    "doge": {"keep_window_size": 2048},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [32, 64],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh", "local", "lsh"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "emu3": {"vocabulary_map": {"<image>": 300, **{f"<|visual token {i:06}|>": 301 + i for i in range(8)}}},
    "xlstm": {"qk_dim_factor": 1.0},  # half of 64 is rounded up in one place, and not in the other
    "prophetnet": {"max_position_embeddings": 1024},  # it makes tables of this size squared in every pass
    "big_bird": {"attention_type": "original_full"},  # a decoder has no other
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
}

_SCALED = {"rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 64}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", **_SCALED}}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **_SCALED}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-llama3": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED}},
    ),
    "phi3-longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [1.0, 2.0, 4.0, 6.0, 9.0, 13.0, 18.0, 24.0],
            },
        },
    ),
    "llama4-tempered": ("llama4_text", {"floor_scale": 64, "attn_scale": 0.5}),
    "bert-encoder": ("bert", {"is_decoder": False}),
    "gemma4-moe": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 32, "top_k_experts": 4, "moe_intermediate_size": 32},
    ),
    "bloom-wide": ("bloom", {"n_head": 8}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "multi_query": False}),
    "qwen2-full": ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    "minimax-m1": ("minimax", {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 256}),
}
"""Name → model type, changes: what an architecture can be, and its defaults are not."""


def _long_factors_always(config: Any) -> None:
    rope = config.rope_parameters
    config.rope_parameters = {**rope, "short_factor": rope["long_factor"]}


REFERENCE: dict[str, Callable[[Any], None]] = {
    # transformers changes the factors when a sequence grows past the original context, and leaves the keys before it as
    # they were; served models have one set, chosen by the context that they are served with.
    "phi3-longrope": _long_factors_always,
}
"""What has to be changed in the config of the reference."""

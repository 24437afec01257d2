"""Checkpoints of two layers in the shapes that people run, with a real byte-level tokenizer; written in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine import ensure_noise_checkpoint

COMMON = {
    "vocab_size": 448,  # a few rows more than the tokenizer has tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "llama": {},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"original_max_position_embeddings": 2048},
    "gemma2": {"head_dim": 16, "sliding_window": 24},  # soft-capped scores
    "mistral": {"sliding_window": 24},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 2048,
    },
    "gpt_oss": {  # sinks, mixture of experts
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "bloom": {"n_layer": 2, "n_head": 4},  # its own attention: served by the fallback runner
    "mamba": {"state_size": 8, "num_hidden_layers": 2},  # recurrent: served by the fallback runner
}


def write(folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, scale: float = 0.1, **config: Any) -> Path:
    """Write a checkpoint of a family into `folder`, the same one every time."""
    settings = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **config})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, scale, generator=generator)
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ensure_noise_checkpoint()).save_pretrained(folder)
    return folder

"""LoRA adapters in PEFT's format, for the tiny models: written in a moment, the same ones every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS: dict[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_oss": ATTENTION,
}
"""The layers that are adapted, by family; all others: every projection of attention and of the MLP."""
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def layers_of(base: Path, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """The names of a checkpoint's layers that have one of some names, and each one's numbers of results and inputs."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = {}
    for name, module in model.named_modules():
        if not name.endswith(targets):
            continue
        assert isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        rows, columns = module.weight.shape
        found[name] = (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
    return found


def write(
    folder: Path,
    base: Path,
    *,
    targets: tuple[str, ...] = ALL,
    rank: int = 4,
    seed: int = 1,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    ranks: Callable[[str], int] | None = None,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    **config: Any,
) -> Path:
    """Write an adapter for the model in `base`.

    `ranks`: of each layer, by its name; `change`: alters the tensors; `config`: keys of its configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (rows, columns) in layers_of(base, targets).items():
        r = ranks(name) if ranks else rank
        a = torch.randn(r, columns, generator=generator) * scale
        b = torch.randn(rows, r, generator=generator) * scale
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**settings(targets, rank), **config}))
    return folder


def settings(targets: tuple[str, ...] = ALL, rank: int = 4) -> dict[str, Any]:
    """An adapter_config.json as PEFT 0.21 writes it."""
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "a/base",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(targets),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }

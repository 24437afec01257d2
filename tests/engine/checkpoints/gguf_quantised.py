"""Tiny GGUF files with quantised weights of any kind and of several families, read in three ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from engine import ModelConfig
from engine.checkpoints import gguf_file
from engine.checkpoints.gguf.groups import KINDS
from engine.checkpoints.gguf.stream import GGUFStream, packed_bytes
from engine.checkpoints.reading import load_model
from engine.compute.cpu.kernels import Kernels
from tests import tiny_models
from tests.engine.gguf_files import KNOWN_TOKENS, byte_level

Kinds = Callable[[str], str]
"""From a tensor's name in the file to its kind."""

_ARCHITECTURES = {"gemma3_text": "gemma3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
_KEYS = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
"""Where transformers lists an architecture's keys, if not under its own name."""
_SMALL = {
    # Where a block has its scale and its factor of minima, and what makes random numbers spread by one around zero.
    "Q2_K": ((80, 1 / 9.6), (82, 1.5 / 9.6)),
    "Q3_K": ((108, 1 / 41),),
    "Q4_K": ((0, 1 / 165), (2, 7.5 / 165)),
    "Q5_K": ((0, 1 / 330), (2, 15.5 / 330)),
    "Q6_K": ((208, 1 / 1350),),
}


def blocks(shape: tuple[int, int], kind: str, seed: int, spread: float = 0.1) -> np.ndarray:
    """Make `[columns, bytes]` whose numbers spread around zero; of K kinds, random bytes with fitting scales."""
    random, (columns, depth) = np.random.default_rng(seed), shape
    if kind not in _SMALL:
        weights = random.normal(0, spread, shape).astype(np.float32)
        return quants.quantize(weights, GGMLQuantizationType[kind])
    of = KINDS[kind]
    rows = random.integers(0, 256, (columns, depth // of.values, of.size), dtype=np.uint8)
    for at, factor in _SMALL[kind]:
        sizes = random.uniform(0.5, 1.5, (columns, depth // of.values, 1)) * spread * factor
        rows[:, :, at : at + 2] = sizes.astype(np.float16).view(np.uint8)
    return rows.reshape(columns, -1)


def folder_of(folder: Path, family: str, **config: Any) -> Path:
    """Write a checkpoint of a family whose rows are long enough for blocks of 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": KNOWN_TOKENS, "head_dim": 64}
    return tiny_models.write(folder, family, **{**sizes, **config})


def write_quantised(folder: Path, file: Path, kinds: Kinds, *, tied: bool = True, seed: int = 0) -> Path:
    """Write a file of the shapes of a folder, with random weights; matrices are of the kinds asked for."""
    config = AutoConfig.from_pretrained(folder)
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)())
    writer = gguf.GGUFWriter(file, architecture)
    _add_keys(writer, architecture, config)
    byte_level(writer, folder, "gpt-2")
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    shapes = {name: tuple(model.state_dict()[own].shape) for name, own in names.items()}
    shapes = dict(
        _of_experts(name, shape) if name.endswith("_exps") else (name, shape) for name, shape in shapes.items()
    )
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        if name == "output.weight" and tied:
            continue
        if "ffn_gate_inp_shexp" in name:  # one row is stored as a vector
            shape = shape[1:]
        random = np.random.default_rng(1000 * seed + number)
        kind = kinds(name) if len(shape) in (2, 3) else "F32"
        if kind == "F32":
            weights = random.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float32)
            writer.add_tensor(name, weights)
        else:
            data = blocks((math.prod(shape[:-1]), shape[-1]), kind, 1000 * seed + number)
            data = data.reshape(*shape[:-1], data.shape[-1])
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _of_experts(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Experts' gate and up are one weight in the model, and two in a file."""
    experts, columns, depth = shape
    return f"{name}.weight", (experts, columns if "down" in name else columns // 2, depth)


def _add_keys(writer: GGUFWriter, architecture: str, config: Any) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    for key, own in GGUF_CONFIG_MAPPING[_KEYS.get(architecture, architecture)].items():
        value = rope.get("rope_theta") if own == "rope_theta" else getattr(config, own, None) if own else None
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)


def widened(file: Path) -> nn.Module:
    """Load a file as plain transformers does."""
    with gguf_file.alone(file) as source, gguf_file.fast_reading():
        model: nn.Module = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model.eval()


def packed(file: Path) -> nn.Module:
    """Load a file with its quantised weights packed, before any backend has fused it."""
    header = gguf_file.open_file(file, "m")
    found = gguf_file.inspect(header, packed_bytes(header))
    config = ModelConfig(id="m", path=file)
    return load_model(
        config, found, torch.float32, {"": "cpu"}, header, gguf=GGUFStream(header, Kernels.load(), config.id)
    )

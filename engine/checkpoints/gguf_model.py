"""Complete a model that transformers read from a GGUF file with what it skips, or refuse the file.

transformers skips keys and tensors that it does not know, silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.checkpoints.gguf_file import GGUFFile, reader_class
from engine.errors import LoadError

__all__ = ["by_function", "complete_model"]

_ADVICE = "its replies would be wrong. Serve the checkpoint that the file was made of."

_SCALED_BY_WIDTH = {("gemma2", 4608), ("gemma3", 5376)}
"""Architecture and hidden size of the 27B models, whose `query_pre_attn_scalar` is hidden size / heads, and not 256."""
_NEUTRAL = frozenset({"rope.scaling.factor", "rope.scaling.attn_factor", "expert_weights_scale"})
"""Factors that change nothing if they are 1, or 0 for absent."""
_HARMLESS = frozenset({"vocab_size", "context_length", "rope.scaling.finetuned", "use_parallel_residual"})
"""Keys of an architecture that change no number: sizes that the tensors have anyway, and remarks."""
_CHECKED = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "rope.scaling.original_context_length": "max_position_embeddings",
}
"""Keys that transformers may skip, and the attribute of its configuration that must then equal them."""


def complete_model(file: GGUFFile, model: nn.Module, name: str) -> None:
    """Apply settings that transformers does not read: factors of rotary embeddings, a scale of scores.

    Raises:
        LoadError: the file says something that would change the model's numbers and is not understood.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    prefix = f"{file.architecture}."
    heads = f"{prefix}attention.head_count_kv"
    if file.architecture == "llama" and heads not in file.metadata:
        raise LoadError(
            f"{name}: {file.path.name} lacks {heads}, without which transformers leaves the rows of queries and keys "
            f"in another order: {_ADVICE}"
        )
    for key, value in file.metadata.items():
        short = key.removeprefix(prefix)
        if key.startswith(prefix) and not _is_read(file.architecture, short) and not _agrees(short, value, config):
            raise LoadError(
                f"{name}: {file.path.name} says {key} = {str(value)[:60]}, which transformers does not read: {_ADVICE}"
            )
    _check_tensors(file, model, name)
    _scale_scores(file.architecture, model, config)
    if "rope_freqs.weight" in file.sizes:
        _scale_frequencies(file, model, name)


def _is_read(architecture: str, key: str) -> bool:
    """Tell whether transformers reads a key of an architecture. It maps keys that it knows and ignores to None."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    if by_function(architecture):
        return key not in _CHECKED and "scal" not in key and key != "rope.dimension_count"
    spelled = (architecture, architecture.replace("-", "_"), architecture.replace("moe", "_moe"))
    return any(GGUF_CONFIG_MAPPING.get(name, {}).get(key) is not None for name in spelled)


def by_function(architecture: str) -> bool:
    """Tell whether transformers converts an architecture by a function of its own, which reports dropped tensors."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        return False
    return architecture in GGUF_CONFIG_ARCHS


def _agrees(key: str, value: Any, config: Any) -> bool:
    """Tell whether the configuration already has the value of a skipped key."""
    if key in _HARMLESS:
        return True
    if key == "rope.scaling.type":
        return str(value) == "none"
    if not isinstance(value, int | float):
        return False
    if key in _NEUTRAL:
        return value in (0.0, 1.0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    own: Any
    if key == "rope.dimension_count":
        own = head_dim * rope.get("partial_rotary_factor", 1.0)
    elif key == "rope.freq_base":
        own = rope.get("rope_theta")
    else:
        own = head_dim if _CHECKED.get(key) == "head_dim" else getattr(config, _CHECKED.get(key, ""), None)
    return own is not None and abs(float(own) - value) <= 1e-6 * abs(value)


def _check_tensors(file: GGUFFile, model: nn.Module, name: str) -> None:
    """Refuse tensors that transformers has dropped because the model has no place for them (a bias, say)."""
    longrope = [tensor for tensor in file.sizes if tensor.startswith("rope_factors_")]
    if by_function(file.architecture):  # engine/checkpoints/reading.py checks the tensors that it reports
        dropped = longrope
    else:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)()
        known = {"rope_freqs.weight", *get_gguf_hf_weights_map(model, processor)}
        dropped = longrope + [t for t in file.sizes if t not in known and t.removesuffix(".weight") not in known]
    if dropped:
        raise LoadError(
            f"{name}: {file.path.name} holds {dropped[0][:60]}, which transformers does not read: {_ADVICE}"
        )


def _scale_scores(architecture: str, model: nn.Module, config: Any) -> None:
    """Scale the scores of the largest Gemmas by their own number, which no key holds: llama.cpp goes by name."""
    if (architecture, config.hidden_size) not in _SCALED_BY_WIDTH:
        return
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    for module in model.modules():
        if hasattr(module, "q_proj") and hasattr(module, "scaling"):
            module.scaling = config.query_pre_attn_scalar**-0.5


def _scale_frequencies(file: GGUFFile, model: nn.Module, name: str) -> None:
    """Divide the rotary frequencies by `rope_freqs.weight`: Llama 3.1's scaling, as llama.cpp stores and applies it."""
    tensor = next(t for t in reader_class()(file.path).tensors if t.name == "rope_freqs.weight")
    factors = torch.tensor(tensor.data.tolist(), dtype=torch.float32)
    rotary = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    if not rotary or any(m.inv_freq.shape != factors.shape or getattr(m, "rope_type", "") != "default" for m in rotary):
        raise LoadError(
            f"{name}: {file.path.name} holds rope_freqs.weight, and {type(model).__name__} has no rotary embedding "
            f"that it fits: {_ADVICE}"
        )
    for module in rotary:
        for buffer in ("inv_freq", "original_inv_freq"):
            if hasattr(module, buffer):
                own = getattr(module, buffer)
                setattr(module, buffer, own / factors.to(own.device))

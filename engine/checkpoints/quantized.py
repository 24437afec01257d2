"""Ask transformers whether it can load a quantised checkpoint here, before a weight is read.

Knows no method by name: transformers' own quantizers say what they need. Some (fine-grained FP8, MXFP4) widen the
weights again where there is no GPU for them; then the model is like any other, and packed like it. Layers of the others
stay what transformers made of them, and the self-test says whether the law holds with them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from engine.checkpoints.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.errors import LoadError, one_line


def check(config: ModelConfig, found: Checkpoint, device_map: Any, dtype: torch.dtype) -> int | None:
    """Estimate the bytes of memory that a quantised checkpoint needs when loaded; None if it is not one.

    Raises:
        LoadError: a package or a device is missing, in the words of transformers' quantizer, or the method is unknown.
    """
    given = found.config.get("quantization_config")
    if given is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    method = given.get("quant_method", "unknown") if isinstance(given, dict) else "unknown"
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(given), pre_quantized=True)
        quantizer.validate_environment(device_map=device_map, dtype=dtype)
    except Exception as error:  # each method has its own; what it says is what helps
        reason = one_line(error)
        raise LoadError(
            f"{config.id}: the checkpoint is quantised ({method}), and cannot be loaded here: {reason}"
        ) from error
    if getattr(quantizer.quantization_config, "dequantize", False):
        return max(found.stored_bytes, parameters(config, found) * dtype.itemsize)
    return found.stored_bytes


def parameters(config: ModelConfig, found: Checkpoint) -> int:
    """Count the parameters that the configuration describes: packed numbers cannot be counted in the files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        trust = {"trust_remote_code": config.trust_remote_code}  # None would ask on standard input
        plain = AutoConfig.from_pretrained(found.folder, local_files_only=True, **trust)
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, **trust)
        return sum(parameter.numel() for parameter in model.parameters())
    except Exception:  # an architecture of its own: loading will say what is wrong with it
        return 0

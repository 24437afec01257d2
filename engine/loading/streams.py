"""Decide whether a checkpoint's weights are packed while they are read, and as what."""

from __future__ import annotations

from engine.checkpoints import packed_layers
from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.streamed import tensor_reader
from engine.checkpoints.streamed.layers import Streaming
from engine.compute.cpu.kernels import Kernels
from engine.compute.whole import quantised
from engine.config import ModelConfig
from engine.errors import LoadError

__all__ = ["reads_quantised", "streaming"]


def streaming(config: ModelConfig, found: Checkpoint, kernels: Kernels | None) -> Streaming | None:
    """Choose for float32 on a CPU how weights are stored while they are read; None: only once the model is whole.

    Raises:
        LoadError: the layers of a checkpoint that comes quantised cannot be found.
    """
    if not found.folder.is_dir() or config.merged_adapter is not None or not tensor_reader.can_read(found, config.id):
        return None
    if reads_quantised(found):
        told = packed_layers.describe(found, config.id)
        return Streaming(kernels, config.quantization, told["layers"], told["settings"])
    if kernels is None or found.config.get("quantization_config") is not None:
        return None
    return Streaming(kernels, config.quantization)


def reads_quantised(found: Checkpoint) -> bool:
    """Tell whether a checkpoint comes quantised in a form whose layers are read here, without transformers."""
    if not packed_layers.can_stay_packed(found):
        return False
    try:
        quantised.check(found.config["quantization_config"])
    except LoadError:
        return False
    return True

"""Decide whether a checkpoint's weights are packed while they are read, and as what, and by whom they are read."""

from __future__ import annotations

from engine.checkpoints import packed_layers
from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.gguf.stream import GGUFStream
from engine.checkpoints.gguf_file import GGUFFile
from engine.checkpoints.streamed import tensor_reader
from engine.checkpoints.streamed.layers import Streaming
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.packed_weight import Keep, make_each
from engine.compute.whole import quantised
from engine.config import ModelConfig
from engine.errors import LoadError

__all__ = ["gguf_stream", "reads_quantised", "streaming"]


def gguf_stream(
    config: ModelConfig, file: GGUFFile | None, kernels: Kernels | None, keep: Keep = make_each
) -> GGUFStream | None:
    """Make what keeps a GGUF file's quantised weights packed; None without kernels."""
    return None if file is None or kernels is None else GGUFStream(file, kernels, config.id, keep)


def streaming(
    config: ModelConfig, found: Checkpoint, kernels: Kernels | None, keep: Keep = make_each
) -> Streaming | None:
    """Choose for float32 on a CPU how weights are stored while they are read; None: only once the model is whole.

    Raises:
        LoadError: the layers of a checkpoint that comes quantised cannot be found.
    """
    if not found.folder.is_dir() or config.merged_adapter is not None or not tensor_reader.can_read(found, config.id):
        return None
    if reads_quantised(found):
        told = packed_layers.describe(found, config.id)
        return Streaming(kernels, config.quantization, told["layers"], told["settings"], keep)
    if kernels is None or found.config.get("quantization_config") is not None:
        return None
    return Streaming(kernels, config.quantization, keep=keep)


def reads_quantised(found: Checkpoint) -> bool:
    """Tell whether a checkpoint comes quantised in a form whose layers are read here, without transformers."""
    if not packed_layers.can_stay_packed(found):
        return False
    try:
        quantised.check(found.config["quantization_config"])
    except LoadError:
        return False
    return True

"""Linear layers whose weights are packed for the kernels of the CUDA path: read from a checkpoint, or rounded here.

transformers reads the files: the layers that the files hold packed become `PackedLayer`, which has a tensor for each of
the stored ones, and packs them anew when all are there. No package of a quantiser is needed. A layer in a form that the
kernels cannot read is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.safetensors_file import TensorEntry, read_header
from engine.compute.cuda import weights
from engine.compute.cuda.operations import LinearWeight
from engine.compute.whole import quantised
from engine.errors import LoadError

__all__ = ["PackedLayer", "can_stay_packed", "describe", "round_layers"]

_NAME: Final = "verbatim_packed"
"""What transformers knows our way to load by: a value of `quant_method`."""
_PACKED: Final = ("qweight", "weight_packed")
"""Tensors that make a layer a packed one."""
_DTYPES: Final = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32},
    **{"I64": torch.int64, "I32": torch.int32, "I8": torch.int8},
}


class PackedLayer(nn.Module):
    """A linear layer with quantised weights.

    Attributes:
        in_features, out_features: as in `nn.Linear`.
        packed: the weight, once `pack` was called.
    """

    def __init__(self, in_features: int, out_features: int, stored: Mapping[str, tuple[str, list[int]]]) -> None:
        """Make room, without memory, for the tensors that a file holds: their dtypes and shapes by name."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.packed: LinearWeight | None = None
        for name, (dtype, shape) in stored.items():
            self.register_buffer(name, torch.empty(shape, dtype=_DTYPES[dtype], device="meta"))

    @classmethod
    def of(cls, packed: LinearWeight) -> PackedLayer:
        """Make a layer of a weight that is packed already."""
        layer = cls(packed.in_features, packed.out_features, {})
        layer.packed = packed
        return layer

    def pack(self, settings: Mapping[str, Any]) -> None:
        """Pack the tensors that have been loaded; they are not kept. `settings`: the `quantization_config`.

        Raises:
            LoadError: they cannot be packed, or are not a weight of this layer's shape.
        """
        tensors = dict(self.named_buffers(recurse=False))
        packed = weights.from_checkpoint(tensors, settings)
        found, wanted = [packed.out_features, packed.in_features], [self.out_features, self.in_features]
        if found != wanted:
            raise LoadError(f"the weight has the shape {found}, and the model wants {wanted}.")
        self._buffers.clear()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """Compute with the widened weight, for comparison: `x [..., in]` to `[..., out]` of the same dtype."""
        assert self.packed is not None
        bias = self.packed.bias
        return F.linear(x, weights.widened(self.packed).to(x.dtype), None if bias is None else bias.to(x.dtype))


@torch.inference_mode()
def round_layers(model: nn.Module, kind: str, name: str, say: Callable[[str], None]) -> None:
    """Round the weights of a model's linear layers in place, those of its output layer aside, and free the originals.

    Args:
        kind: `int8` or `int4`; name: the model's id, for messages.

    Raises:
        LoadError: a weight cannot be rounded so.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    places = [
        (parent, child_name, child)
        for parent in model.modules()
        for child_name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head
    ]
    while places:
        parent, child_name, child = places.pop()
        try:
            packed = _ROUND[kind](child.weight, child.bias)
        except LoadError as error:
            raise LoadError(f"{name}: quantization: {kind} cannot be used: {child_name}: {error.message}") from error
        setattr(parent, child_name, PackedLayer.of(packed))
        del child
        if len(places) % _TELL_EVERY == 0:
            say(f"rounding weights to {kind}, {len(places)} layers left")


_ROUND: Final = {"int8": weights.int8, "int4": weights.int4}
_TELL_EVERY: Final = 32


def can_stay_packed(found: Checkpoint) -> bool:
    """Whether a checkpoint is quantised by a method whose layers the kernels may be able to read."""
    given = found.config.get("quantization_config")
    return isinstance(given, dict) and given.get("quant_method") in quantised.METHODS


def describe(found: Checkpoint, name: str) -> dict[str, Any]:
    """Return a `quantization_config` that makes transformers load packed layers as `PackedLayer`.

    Args:
        name: the model's id, for messages.

    Raises:
        LoadError: the files hold no packed layer, or one with a tensor of an unknown type.
    """
    _register()
    layers: dict[str, dict[str, tuple[str, list[int]]]] = {}
    entries: dict[str, TensorEntry] = {}
    for file in found.files:
        entries |= read_header(file, name)
    for tensor, entry in entries.items():
        place, _, own = tensor.rpartition(".")
        if own in _PACKED or (own == "weight" and entry.dtype == "I8" and f"{place}.weight_scale" in entries):
            layers[place] = {}
    for tensor, entry in entries.items():
        place, _, own = tensor.rpartition(".")
        if place in layers:
            if entry.dtype not in _DTYPES:
                raise LoadError(f"{name}: {tensor} is of type {entry.dtype}, which no packed layer has.")
            layers[place][own] = (entry.dtype, list(entry.shape))
    if not layers:
        raise LoadError(f"{name}: config.json has a quantization_config, and the files hold no packed layer.")
    return {"quant_method": _NAME, "layers": layers, "settings": found.config["quantization_config"]}


@functools.cache
def _register() -> None:
    """Teach transformers our way to load, once in a process."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(_NAME)
    class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, layers: Mapping[str, Any], settings: Mapping[str, Any], quant_method: str) -> None:
            self.quant_method, self.layers, self.settings = quant_method, layers, settings

    @register_quantizer(_NAME)
    class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
        is_trainable = False

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            for place, stored in self.quantization_config.layers.items():
                try:
                    layer = model.get_submodule(place)
                except AttributeError:  # a part that this class does not have; transformers reports its tensors
                    continue
                if isinstance(layer, nn.Linear):
                    model.set_submodule(place, PackedLayer(layer.in_features, layer.out_features, stored))

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
            for place, layer in model.named_modules():
                if isinstance(layer, PackedLayer):
                    try:
                        layer.pack(self.quantization_config.settings)
                    except LoadError as error:
                        raise LoadError(f"{place}: {error.message}") from error

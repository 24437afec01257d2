"""Pack each weight of a checkpoint for the CPU's kernels as soon as it is read: no model is ever whole in float32.

transformers loads as always, and knows where each tensor belongs. We are its quantizer: tensors of plain linear layers,
of the embedding, and of layers that come quantised are handed to us one by one, and are packed at once
(`engine.compute.cpu.storing`). When all are there, `StoredLinear` and `StoredEmbedding` take the layers' places. What
is not known to be safe stays with transformers, and the backend packs it later.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.checkpoints.streamed.tensor_reader import DTYPES, StoredTensor
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.reordered import ReorderedLinear
from engine.compute.cpu.packed_weight import PackedWeight
from engine.compute.cpu.stored_linear import StoredEmbedding, StoredLinear
from engine.compute.cpu.storing import Columns, packed_kind, store
from engine.compute.linear import WideningEmbedding
from engine.compute.whole import quantised
from engine.errors import LoadError
from engine.host_memory import give_back_memory

__all__ = ["StreamedModel", "Streaming", "as_quantizer"]

_NAME: Final = "verbatim_streamed"
"""What transformers knows our way to load by: a value of `quant_method`."""
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TRIED_ROWS: Final = 8
_TRIM_EVERY: Final = 1 << 24
"""Numbers read after which freed memory is given back."""


@dataclass(frozen=True, slots=True)
class Streaming:
    """How weights are stored while they are read.

    Attributes:
        kernels: what packs them; None: only layers that come quantised are taken, and widened to float32.
        quantization: as in an entry; None: as they are, those that come quantised in their groups.
        layers: tensors of the layers that come quantised, by place: their types and shapes by name.
        settings: the checkpoint's `quantization_config`.
    """

    kernels: Kernels | None
    quantization: str | None
    layers: Mapping[str, Mapping[str, tuple[str, list[int]]]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(slots=True)
class _Kept:
    """What is kept of a weight: packed, and the table of an embedding where it is another."""

    packed: PackedWeight | None = None
    table: Tensor | None = None


class _Waiting(nn.Module):
    """Stands for a layer that comes quantised, until its tensors are there. Has room for none of them."""

    def __init__(self, layer: nn.Linear, stored: Mapping[str, tuple[str, list[int]]]) -> None:
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        self.tensors: dict[str, Tensor] = {}
        self.wanted = set(stored)
        for name, (dtype, shape) in stored.items():
            self.register_buffer(name, torch.empty(shape, dtype=DTYPES[dtype], device="meta"))


class StreamedModel:
    """The weights of one model, from their files to the layers that hold them. Methods are called in their order.

    Attributes:
        mismatched: name, stored and wanted shape of weights of another model.
        error: the first thing that went wrong, which transformers would only tell in words.
    """

    def __init__(self, streaming: Streaming) -> None:
        self._how = streaming
        self._kinds: dict[str, str] = {}
        self._tied: tuple[str, ...] = ()
        self._table, self._shares = "", False
        self._kept: dict[str, _Kept] = {}
        self._sources: dict[str, StoredTensor] = {}
        self._layers: dict[str, nn.Module] = {}
        self._read = 0
        self.mismatched: list[tuple[str, torch.Size, torch.Size]] = []
        self.error: Exception | None = None

    # -- before a tensor is read ---------------------------------------------------------------------------------------

    def plan(self, model: Any) -> None:
        """Choose the weights that are taken, by the model without memory."""
        for place, stored in self._how.layers.items():
            try:
                layer = model.get_submodule(place)
            except AttributeError:  # a part that this class does not have; transformers reports its tensors
                continue
            if isinstance(layer, nn.Linear):
                model.set_submodule(place, _Waiting(layer, stored))
        if self._how.kernels is None:
            return
        head, names = model.get_output_embeddings(), {}
        for place, module in model.named_modules():
            if _is_linear(module):
                names[f"{place}.weight"] = packed_kind(self._how.quantization, table=module is head)
        tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
        embedding = model.get_input_embeddings()
        own = next((f"{place}.weight" for place, m in model.named_modules() if m is embedding), "")
        pair = {own, *(name for name in names if name in tied)}
        self._kinds = {name: kind for name, kind in names.items() if name not in tied}
        if not isinstance(embedding, nn.Embedding) or embedding.weight.dtype != torch.float32:
            return
        kind = packed_kind(self._how.quantization, table=True)
        self._shares = kind != "int8" and _scale_of(embedding) is not _UNKNOWN
        if tied and tied == pair and len(pair) == 2:
            self._tied, self._table = tuple(sorted(pair)), own
            self._kinds |= dict.fromkeys(pair, kind)
        elif not tied:
            self._table, self._shares = own, self._shares and kind == "8 bits"
            self._kinds[own] = kind

    def takes(self, name: str) -> bool:
        """Tell whether a parameter or buffer of the model is handed to `take`."""
        return name in self._kinds or any(name.rpartition(".")[0] == place for place in self._how.layers)

    # -- while they are read -------------------------------------------------------------------------------------------

    def take(self, model: Any, name: str, value: Tensor | StoredTensor) -> Tensor | None:
        """Keep a tensor of the model, packed. Returns what transformers shall load in its place, if anything."""
        self._read += value.shape.numel()
        if self._read > _TRIM_EVERY:  # what was freed would stay in the process, in pieces that fit nothing
            self._read = 0
            give_back_memory()
        place, _, own = name.rpartition(".")
        module = model.get_submodule(place)
        if isinstance(module, _Waiting):
            module.tensors[own] = value.read() if isinstance(value, StoredTensor) else value
            if module.tensors.keys() == module.wanted:
                self._layers[place] = self._quantised(place, module)
            return None
        weight = module.weight
        if value.dtype not in _FLOATS:
            return (value.read() if isinstance(value, StoredTensor) else value).to(weight.dtype)
        weight._is_hf_initialized = True  # it stays without memory, and is not filled with random numbers
        if value.shape != weight.shape:
            self.mismatched.append((name, torch.Size(value.shape), weight.shape))
            return None
        self._kept[name] = self._same_as_before(name, value) or self._keep(name, module, value)
        return None

    def _keep(self, name: str, module: nn.Module, value: Tensor | StoredTensor) -> _Kept:
        kept, kernels = _Kept(), self._how.kernels
        assert kernels is not None
        is_table = name == self._table or name in self._tied
        if name not in self._tied and is_table and not self._shares:
            return _Kept(table=value.read() if isinstance(value, StoredTensor) else value)
        read, columns, depth = _columns(module, value)
        try:
            kept.packed = store(kernels, self._kinds[name], read, columns, depth)
        except LoadError as error:
            raise LoadError(f"{name.removesuffix('.weight')}: {error.message}") from error
        if is_table and not self._shares:
            kept.table = value.read() if isinstance(value, StoredTensor) else value
        return kept

    def _same_as_before(self, name: str, value: Tensor | StoredTensor) -> _Kept | None:
        """Find what was kept of the tied weight, if the file holds the same numbers twice."""
        if name not in self._tied or not isinstance(value, StoredTensor):
            return None
        for other, source in self._sources.items():
            if _equal(value, source):
                return self._kept[other]
        self._sources[name] = value
        return None

    def _quantised(self, place: str, waiting: _Waiting) -> nn.Module:
        """Bring a layer that came quantised into the kernels' layout, or widen it."""
        how = self._how
        try:
            layer = quantised.read(waiting.tensors, how.settings)
            if layer.numbers.shape != waiting.shape:
                found, wanted = list(layer.numbers.shape), list(waiting.shape)
                raise LoadError(f"the weight has the shape {found}, and the model wants {wanted}.")
            groups = quantised.groups_of(layer)
        except LoadError as error:
            raise LoadError(f"{place}: {error.message}") from error
        finally:
            waiting.tensors.clear()
        bias = None if layer.bias is None else layer.bias.to(torch.float32).contiguous()
        if how.kernels is not None and how.quantization is None:
            stored = StoredLinear(how.kernels, how.kernels.pack_groups(groups, bias))
            return stored if layer.order is None else ReorderedLinear(stored, layer.order, groups.depth, groups.columns)
        wide = groups.widened()
        if layer.order is not None:
            wide[:, layer.order] = wide.clone()
        if how.kernels is None:
            return _plain(wide, bias)
        kind = packed_kind(how.quantization, table=False)
        packed = store(how.kernels, kind, lambda start, end: wide[start:end], *wide.shape)
        return StoredLinear(how.kernels, dataclasses.replace(packed, bias=bias))

    # -- when all are there --------------------------------------------------------------------------------------------

    def finish(self, model: Any) -> None:
        """Put the layers that hold the weights in the places of the model's own."""
        for place, layer in self._layers.items():
            model.set_submodule(place, layer)
        kernels = self._how.kernels
        if kernels is None:
            return
        kept = {id(model.get_parameter(name)): weight for name, weight in self._kept.items()}
        embedding = model.get_input_embeddings()
        table = kept.get(id(getattr(embedding, "weight", None)))
        for place, module in list(model.named_modules()):
            if _is_linear(module) and id(module.weight) in kept:
                packed = kept[id(module.weight)].packed
                assert packed is not None
                bias = None if module.bias is None else module.bias.detach().to(torch.float32).contiguous()
                model.set_submodule(place, StoredLinear(kernels, dataclasses.replace(packed, bias=bias)))
        if table is not None:
            self._finish_embedding(model, embedding, table)
        self._kept.clear()
        self._sources.clear()
        self._layers.clear()

    def _finish_embedding(self, model: Any, embedding: nn.Embedding, kept: _Kept) -> None:
        kernels = self._how.kernels
        assert kernels is not None
        if kept.table is not None:
            embedding.weight = nn.Parameter(kept.table, requires_grad=False)
            if kept.table.dtype != torch.float32:
                model.set_input_embeddings(WideningEmbedding(embedding))
            return
        assert kept.packed is not None
        stored = StoredEmbedding(kernels, kept.packed, _scale_of(embedding))
        ids = torch.arange(min(_TRIED_ROWS, kept.packed.columns), dtype=torch.int64)
        rows = kernels.widen(kept.packed, ids)
        embedding.padding_idx = None  # has no meaning without training, and would be checked against the few rows
        right = torch.func.functional_call(embedding, {"weight": rows}, (ids,))
        if not torch.equal(stored(ids), right):  # it does more than multiply
            embedding.weight = nn.Parameter(kernels.widen(kept.packed), requires_grad=False)
            return
        model.set_input_embeddings(stored)


_UNKNOWN: Final = torch.zeros((), dtype=torch.float32)
"""Stands for what an embedding of another class does with its rows."""


def _scale_of(embedding: nn.Embedding) -> Tensor | None:
    """Return what an embedding multiplies its rows with, None for nothing; `_UNKNOWN` where that cannot be told."""
    if type(embedding) is nn.Embedding:
        return None
    scale = getattr(embedding, "embed_scale", None)
    if isinstance(scale, Tensor) and scale.numel() == 1:
        return scale if scale.is_meta else scale.detach().to(torch.float32).reshape(())
    return torch.tensor(scale, dtype=torch.float32) if isinstance(scale, float | int) else _UNKNOWN


def _is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer in float32; GPT-2's `Conv1D` is one, transposed."""
    known = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    weight = getattr(module, "weight", None)
    return known and isinstance(weight, Tensor) and weight.dim() == 2


def _columns(module: nn.Module, value: Tensor | StoredTensor) -> tuple[Columns, int, int]:
    """Return how the weight `[columns, depth]` is read piece by piece, its columns and its depth."""
    rows, others = value.shape
    if type(module).__name__ == "Conv1D":
        whole = (value.read() if isinstance(value, StoredTensor) else value).t()
        return lambda start, end: whole[start:end], others, rows
    if isinstance(value, StoredTensor):
        return value.rows, rows, others
    return lambda start, end: value[start:end], rows, others


def _equal(one: StoredTensor, other: StoredTensor, rows: int = 4096) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    starts = range(0, one.shape[0], rows)
    ends = [min(start + rows, one.shape[0]) for start in starts]
    return all(torch.equal(one.rows(a, b), other.rows(a, b)) for a, b in zip(starts, ends, strict=True))


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return layer


# -- transformers' side ------------------------------------------------------------------------------------------------


def as_quantizer(streamed: StreamedModel) -> tuple[Any, Any]:
    """Return the `quantization_config` that hands a model's weights to `streamed`, and what tells which tensors of the
    files it will hand on unread."""
    config = _classes()(streamed)
    return config, lambda name: config.stays(name)


@functools.cache
def _classes() -> Any:
    """Teach transformers our way to load, once in a process."""
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(_NAME)
    class StreamedConfig(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, streamed: StreamedModel) -> None:
            self.quant_method, self.streamed = _NAME, streamed
            self.stays: Any = lambda name: False

        def __deepcopy__(self, memo: Any) -> StreamedConfig:
            return self

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": _NAME}

    class Take(ConversionOps):  # type: ignore[misc]
        def __init__(self, streamed: StreamedModel) -> None:
            self.streamed = streamed

        def convert(
            self, input_dict: dict[str, Any], *, model: Any, missing_keys: set[str] | None = None, **_: Any
        ) -> dict[str, Any]:
            rest: dict[str, Any] = {}
            for name, values in input_dict.items():
                value = values[0] if isinstance(values, list) else values
                if not self.streamed.takes(name):
                    rest[name] = value
                    continue
                try:
                    value = self.streamed.take(model, name, value)
                except Exception as error:
                    self.streamed.error = self.streamed.error or error
                    raise
                if value is not None:
                    rest[name] = value
                elif missing_keys is not None:
                    missing_keys.discard(name)
            return rest

    @register_quantizer(_NAME)
    class StreamedQuantizer(HfQuantizer):  # type: ignore[misc]
        is_trainable = False

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.pre_quantized = False  # then transformers reads one tensor after the other, when it is wanted
            self.streamed: StreamedModel = quantization_config.streamed

        def is_serializable(self) -> bool:
            return False

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return self.streamed.takes(param_name)

        def get_quantize_ops(self) -> Any:
            return Take(self.streamed)

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            self.streamed.plan(model)

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            renamings = [one for one in weight_conversions if isinstance(one, WeightRenaming)]
            converters = [one for one in weight_conversions if isinstance(one, WeightConverter)]
            known = model.state_dict()

            def stays(name: str) -> bool:
                prefix = model.base_model_prefix
                renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
                if renamed not in known and name in known:  # as transformers does
                    renamed, pattern = rename_source_key(name, [], [], prefix, known)
                return pattern is None and self.streamed.takes(renamed)

            self.quantization_config.stays = stays
            return weight_conversions

        def postprocess_model(self, model: Any, **_: Any) -> None:
            self.remove_quantization_config(model)

    return StreamedConfig

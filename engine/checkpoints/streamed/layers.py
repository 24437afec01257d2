"""Pack each weight of a checkpoint for the CPU's kernels as soon as it is read: no model is ever whole in float32.

transformers loads as always, and knows where each tensor belongs. We are its quantizer: tensors of plain linear layers,
of the embedding, and of layers that come quantised are handed to us one by one, and are packed at once
(`engine.compute.cpu.storing`), and so are those of a layer's experts, one expert after the other. When all are there,
`StoredLinear`, `StoredEmbedding` and `OwnWeight` take their places. What is not known to be safe stays with
transformers, and the backend packs it later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.checkpoints.streamed.tensor_reader import DTYPES, StoredTensor
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.own_weight import OwnWeight
from engine.compute.cpu.layers.reordered import ReorderedLinear
from engine.compute.cpu.packed_weight import Columns, Keep, PackedWeight, make_each
from engine.compute.cpu.stored_linear import StoredEmbedding, StoredLinear
from engine.compute.cpu.storing import packed_kind, store
from engine.compute.linear import WideningEmbedding
from engine.compute.whole import quantised
from engine.compute.whole.groups import Groups
from engine.errors import LoadError
from engine.host_memory import give_back_memory

__all__ = ["StreamedModel", "Streaming"]

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
        keep: keeps packed weights for the next start: of one that is kept, nothing is read.
    """

    kernels: Kernels | None
    quantization: str | None
    layers: Mapping[str, Mapping[str, tuple[str, list[int]]]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keep: Keep = make_each


@dataclass(slots=True)
class _Kept:
    """What is kept of a weight: packed, and the table of an embedding where it is another."""

    packed: PackedWeight | None = None
    table: Tensor | None = None


class _Waiting(nn.Module):
    """Stands for a layer that comes quantised, until its tensors are there. Has room for none of them."""

    def __init__(self, layer: nn.Linear, stored: Mapping[str, tuple[str, list[int]]], *, is_head: bool) -> None:
        """is_head: it is the output layer, which `int4` rounds to six bits."""
        super().__init__()
        self.shape, self.is_head = (layer.out_features, layer.in_features), is_head
        self.tensors: dict[str, Tensor | StoredTensor] = {}
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
        self._experts: dict[str, list[PackedWeight] | None] = {}
        self._sources: dict[str, StoredTensor] = {}
        self._layers: dict[str, nn.Module] = {}
        self._read = 0
        self.mismatched: list[tuple[str, torch.Size, torch.Size]] = []
        self.error: Exception | None = None

    # -- before a tensor is read ---------------------------------------------------------------------------------------

    def plan(self, model: Any) -> None:
        """Choose the weights that are taken, by the model without memory.

        Raises:
            LoadError: experts come quantised.
        """
        head = model.get_output_embeddings()
        for place, stored in self._how.layers.items():
            try:
                layer = model.get_submodule(place)
            except AttributeError:  # a part that this class does not have; transformers reports its tensors
                _refuse_experts(model, place)
                continue
            if isinstance(layer, nn.Linear):
                model.set_submodule(place, _Waiting(layer, stored, is_head=layer is head))
        if self._how.kernels is None:
            return
        names = {}
        for place, module in model.named_modules():
            self._experts |= {f"{place}.{own}": None for own in _expert_weights(module)}
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
            self._table, self._shares = own, self._shares and kind == "6 bits"
            self._kinds[own] = kind

    def takes(self, name: str) -> bool:
        """Tell whether a parameter or buffer of the model is handed to `take`."""
        return name in self._kinds or name in self._experts or name.rpartition(".")[0] in self._how.layers

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
            module.tensors[own] = value
            if module.tensors.keys() == module.wanted:
                self._layers[place] = self._quantised(place, module)
            return None
        weight = module.get_parameter(own)
        if value.dtype not in _FLOATS:
            return _read(value).to(weight.dtype)
        weight._is_hf_initialized = True  # it stays without memory, and is not filled with random numbers
        if value.shape != weight.shape:
            self.mismatched.append((name, torch.Size(value.shape), weight.shape))
            return None
        if name in self._experts:
            self._experts[name] = self._keep_experts(name, value)
            return None
        self._kept[name] = self._keep(name, module, value)
        return None

    def _keep(self, name: str, module: nn.Module, value: Tensor | StoredTensor) -> _Kept:
        is_table = name == self._table or name in self._tied
        if name not in self._tied and is_table and not self._shares:
            return _Kept(table=_read(value))
        packed = self._how.keep(name, lambda: self._packed(name, module, value))
        if not is_table or self._shares:
            return _Kept(packed)
        table = next((kept.table for kept in self._kept.values() if kept.packed is packed), None)
        return _Kept(packed, _read(value) if table is None else table)

    def _packed(self, name: str, module: nn.Module, value: Tensor | StoredTensor) -> PackedWeight:
        """Pack a weight, or find what was packed of the tied one, if the file holds the same numbers twice."""
        if name in self._tied and isinstance(value, StoredTensor):
            for other, source in self._sources.items():
                if _equal(value, source) and (packed := self._kept[other].packed) is not None:
                    return packed
            self._sources[name] = value
        kernels = self._how.kernels
        assert kernels is not None
        try:
            return store(kernels, self._kinds[name], *_columns(module, value))
        except LoadError as error:
            raise LoadError(f"{name.removesuffix('.weight')}: {error.message}") from error

    def _keep_experts(self, name: str, value: Tensor | StoredTensor) -> list[PackedWeight]:
        """Pack weights `[experts, columns, depth]`."""
        return [
            self._how.keep(f"{name} {expert}", partial(self._expert, name, value, expert))
            for expert in range(value.shape[0])
        ]

    def _expert(self, name: str, value: Tensor | StoredTensor, expert: int) -> PackedWeight:
        kernels, kind = self._how.kernels, packed_kind(self._how.quantization, table=False)
        assert kernels is not None
        weight = value.rows(expert, expert + 1)[0] if isinstance(value, StoredTensor) else value[expert]
        try:
            return store(kernels, kind, lambda start, end: weight[start:end], *weight.shape)
        except LoadError as error:
            raise LoadError(f"{name}, expert {expert}: {error.message}") from error

    def _quantised(self, place: str, waiting: _Waiting) -> nn.Module:
        """Bring a layer that came quantised into the kernels' layout, or widen it."""
        how = self._how
        try:
            if how.kernels is None:
                return _plain(*_widened(self._groups(waiting)))
            stored = StoredLinear(how.kernels, how.keep(place, lambda: self._packed_groups(waiting)))
            if how.quantization is not None:
                return stored
            order = quantised.order_of({name: _read(t) for name, t in waiting.tensors.items() if "g_idx" in name})
            return stored if order is None else ReorderedLinear(stored, order, *waiting.shape[::-1])
        except LoadError as error:
            raise LoadError(f"{place}: {error.message}") from error
        finally:
            waiting.tensors.clear()

    def _packed_groups(self, waiting: _Waiting) -> PackedWeight:
        """Pack a layer that came quantised: its own numbers, columns in order, or rounded as the entry asks."""
        how = self._how
        assert how.kernels is not None
        layer, groups = self._groups(waiting)
        if how.quantization is None:
            return how.kernels.pack_groups(groups, layer.bias)
        wide, bias = _widened((layer, groups))
        kind = packed_kind(how.quantization, table=waiting.is_head)
        packed = store(how.kernels, kind, lambda start, end: wide[start:end], *wide.shape)
        return dataclasses.replace(packed, bias=bias)

    def _groups(self, waiting: _Waiting) -> tuple[quantised.Quantised, Groups]:
        layer = quantised.read({name: _read(value) for name, value in waiting.tensors.items()}, self._how.settings)
        if layer.numbers.shape != waiting.shape:
            found, wanted = list(layer.numbers.shape), list(waiting.shape)
            raise LoadError(f"the weight has the shape {found}, and the model wants {wanted}.")
        return layer, quantised.groups_of(layer)

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
        self._finish_experts(model)
        self._kept.clear()
        self._sources.clear()
        self._layers.clear()

    def _finish_experts(self, model: Any) -> None:
        assert self._how.kernels is not None
        packed = {name: parts for name, parts in self._experts.items() if parts is not None}
        for name, parts in packed.items():
            place, _, own = name.rpartition(".")
            module = model.get_submodule(place)
            shape = module.get_parameter(own).shape
            OwnWeight.of(self._how.kernels, parts, shape, plain=True).install(module, own)
        if packed:  # experts one by one, so that only one is widened at a time
            model.set_experts_implementation("eager")
        self._experts.clear()

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
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return False  # a packed weight would be widened to be looked at
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _refuse_experts(model: Any, place: str) -> None:
    """Refuse a layer that comes quantised and is one of experts which the model keeps in one tensor."""
    parent, found, _ = place.partition(".experts.")
    names = {name for name, _ in model.named_parameters()}
    if found and f"{parent}.experts.down_proj" in names:
        raise LoadError(
            f"{place} is quantised; experts are read from float checkpoints, with quantization: int8 or int4 in the "
            "entry, and from GGUF files."
        )


def _expert_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's weights of experts, if each is `[experts, columns, depth]` in float32.

    transformers marks those that it can also compute one by one, and says which of them are transposed.
    """
    found = module._parameters
    if set(found) != {"gate_up_proj", "down_proj"} or getattr(module, "is_transposed", True):
        return ()
    weights = [weight for weight in found.values() if weight is not None]
    fits = all(weight.dim() == 3 and weight.dtype == torch.float32 for weight in weights)
    return tuple(found) if fits and len(weights) == 2 else ()


def _columns(module: nn.Module, value: Tensor | StoredTensor) -> tuple[Columns, int, int]:
    """Return how the weight `[columns, depth]` is read piece by piece, its columns and its depth."""
    rows, others = value.shape
    if type(module).__name__ == "Conv1D":
        whole = _read(value).t()
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


def _read(value: Tensor | StoredTensor) -> Tensor:
    return value.read() if isinstance(value, StoredTensor) else value


def _widened(given: tuple[quantised.Quantised, Groups]) -> tuple[Tensor, Tensor | None]:
    """Return weight `[out, in]` and bias `[out]` in float32, columns in the order of the inputs."""
    layer, groups = given
    wide = groups.widened()
    if layer.order is not None:
        wide[:, layer.order] = wide.clone()
    return wide, None if layer.bias is None else layer.bias.to(torch.float32).contiguous()


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return layer

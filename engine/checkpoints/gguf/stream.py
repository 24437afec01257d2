"""Load a GGUF file tensor by tensor, with the quantised weights of linear layers and the embedding packed as they are.

transformers builds the model, names the tensors, ties weights and reports what is missing, as for every GGUF file; only
the function by which it reads the tensors is replaced meanwhile. In place of a weight that stays packed it is given one
number of its shape, which takes no memory, and at the end the layer is replaced by one that holds the packed weight. No
such weight is ever held in float32, and the file is not mapped: what was read does not stay in memory.

What transformers does to an architecture's tensors is done to all others. A weight stays packed only where that is
known to leave it alone or to reorder its rows (Llama's queries and keys); one of experts, where it is known to put gate
before up (Qwen's mixtures).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from engine.checkpoints.gguf.groups import KINDS, NotFinite, read_groups
from engine.checkpoints.gguf_file import GGUFFile
from engine.checkpoints.gguf_model import by_function
from engine.compute.cpu.kernels import Kernels
from engine.compute.cpu.layers.own_weight import OwnWeight
from engine.compute.cpu.packed_weight import Keep, PackedWeight, make_each
from engine.compute.cpu.stored_linear import StoredEmbedding, StoredLinear
from engine.compute.linear import quasi_random
from engine.compute.whole.groups import Groups
from engine.errors import LoadError

__all__ = ["GGUFStream", "packed_bytes"]

_PROCESSORS: Final = frozenset(
    {
        *("TensorProcessor", "LlamaTensorProcessor"),
        *("Gemma2TensorProcessor", "NemotronTensorProcessor"),  # take one off the norms
        "Qwen2MoeTensorProcessor",
    }
)
"""What transformers does to an architecture's tensors: the classes that leave linear weights alone, or reorder rows."""
_EXPERTS: Final = re.compile(r"(?P<block>blk\.\d+\.ffn)_(?P<part>gate|up|down)_exps\.weight")
"""Weights of a block's experts, `[experts, columns, depth]`."""


def packed_bytes(file: GGUFFile) -> int:
    """Estimate the memory of a file's weights where quantised ones stay packed, and others are widened to float32.

    Returns 0 if none can stay so: there are none, or transformers changes this architecture's weights in another way.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    known = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor).__name__ in _PROCESSORS
    packable = {name for name in file.places if _is_packable(file, name)}
    if by_function(file.architecture) or not known or not packable:
        return 0
    return sum(place.size if name in packable else 4 * file.sizes[name] for name, place in file.places.items())


def _is_packable(file: GGUFFile, name: str) -> bool:
    if not name.endswith(".weight") or file.types[name] not in KINDS:
        return False
    return len(file.places[name].shape) == 2 or bool(_parts_of_experts(file, name))


def _parts_of_experts(file: GGUFFile, name: str) -> list[str]:
    """Return the tensors that make up one weight of experts, gate before up; none if they cannot stay packed in one."""
    found = _EXPERTS.fullmatch(name)
    if found is None or file.architecture not in ("qwen2moe", "qwen3moe"):
        return []
    parts = ["down"] if found["part"] == "down" else ["gate", "up"]
    names = [f"{found['block']}_{part}_exps.weight" for part in parts]
    if not all(part in file.places for part in names):
        return []
    alike = {(file.types[part], file.places[part].shape) for part in names}
    return names if len(alike) == 1 and len(file.places[name].shape) == 3 else []


class GGUFStream:
    """Reads one file's tensors into one model. To be used once: `reading`, then `install`."""

    def __init__(self, file: GGUFFile, kernels: Kernels, name: str, keep: Keep = make_each) -> None:
        """Args:
        name: the model's id, for messages.
        keep: keeps packed weights for the next start: of one that is kept, nothing is read.
        """
        self._file, self._kernels, self._name, self._keep = file, kernels, name, keep
        self._kept: dict[int, PackedWeight] = {}
        self._experts: dict[int, list[PackedWeight]] = {}
        self._stand_ins: list[Tensor] = []  # keep their addresses, by which packed weights are found

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Give transformers this way to read tensors inside the `with` block; it imports the function at each call."""
        from transformers import modeling_gguf_pytorch_utils as module

        own = module.load_gguf_checkpoint
        settings: dict[str, Any] = {}

        def load(path: Any, return_tensors: bool = False, model_to_load: Any = None, torch_dtype: Any = None) -> Any:
            if return_tensors:
                if not settings:
                    settings.update(own(path, return_tensors=False)["config"])
                return {"tensors": self._read(model_to_load, settings)}
            found = own(path, return_tensors=False)
            settings.update(found["config"])
            return found

        module.load_gguf_checkpoint = load
        try:
            yield
        finally:
            module.load_gguf_checkpoint = own

    def install(self, model: nn.Module) -> None:
        """Replace the layers whose weights stay packed, once transformers has loaded the model.

        Raises:
            LoadError: a packed weight has not arrived in the model as it was given.
        """
        found: set[int] = set()
        for parent in list(model.modules()):
            for own, child in list(parent.named_children()):
                weight = child._parameters.get("weight")
                packed = None if weight is None else self._kept.get(weight.data_ptr())
                if weight is not None and packed is not None:
                    found.add(weight.data_ptr())
                    self._replace(parent, own, child, packed)
        for module in list(model.modules()):
            for own, parameter in list(module._parameters.items()):
                parts = None if parameter is None else self._experts.get(parameter.data_ptr())
                if parameter is not None and parts is not None:
                    found.add(parameter.data_ptr())
                    OwnWeight.of(self._kernels, parts, parameter.shape, plain=True).install(module, own)
        missing = len(self._kept) + len(self._experts) - len(found)
        if missing:
            raise LoadError(
                f"{self._name}: {missing} quantised weights of {self._file.path.name} are not "
                f"those of layers of {type(model).__name__}: give the entry quantization: none."
            )
        if self._experts:  # one by one, so that only one is widened at a time
            model.set_experts_implementation("eager")  # type: ignore[operator]
        self._kept.clear()
        self._experts.clear()

    def _replace(self, parent: nn.Module, own: str, child: Any, packed: PackedWeight) -> None:
        if type(child) is nn.Linear:
            bias = None if child.bias is None else child.bias.detach().to(torch.float32).contiguous()
            setattr(parent, own, StoredLinear(self._kernels, dataclasses.replace(packed, bias=bias)))
            return
        if isinstance(child, nn.Embedding):
            scale = _scale_of(child)
            if scale is not None:
                stays = StoredEmbedding(self._kernels, packed, None if bool(scale == 1) else scale)
                setattr(parent, own, stays)
                return
        # A layer that is tied to a packed weight and computes in a way of its own.
        child.weight = nn.Parameter(self._kernels.widen(packed), requires_grad=False)

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self, model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Read all tensors that the model has a place for, by transformers' names; largest first, when memory is free.

        `settings`: what transformers makes of the file's keys.
        """
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        file = self._file
        processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=settings)
        names = get_gguf_hf_weights_map(model, processor)
        loaded: dict[str, Any] = {"config": settings, "tensors": {}}  # processors put merged tensors there themselves
        tensors: dict[str, Tensor] = loaded["tensors"]
        with file.path.open("rb", buffering=0) as handle:
            for name in sorted(file.places, key=lambda name: -file.places[name].size):
                stacked = names.get(name.removesuffix(".weight"))  # experts are no layers with a `weight`
                if parts := self._experts_of(model, stacked, name):
                    if name == parts[0]:
                        tensors[str(stacked)] = self._pack_experts(handle, parts)
                    continue
                order = self._order(model, names.get(name), name, processor)
                if order is not None:
                    tensors[names[name]] = self._pack(handle, name, order)
                    continue
                widened = self._widen(handle, name)
                done = processor.process(weights=widened, name=name, tensor_key_mapping=names, parsed_parameters=loaded)
                if done.name in names:
                    tensors[names[done.name]] = torch.from_numpy(np.ascontiguousarray(done.weights))
        return tensors

    def _order(self, model: nn.Module, own: str | None, name: str, processor: Any) -> Tensor | None:
        """Return the order in which a tensor's rows make up a layer's weight; None if it cannot stay packed."""
        if own is None or not own.endswith(".weight") or not _is_packable(self._file, name):
            return None
        layer: Any = model.get_submodule(own.removesuffix(".weight"))
        embeds = isinstance(layer, nn.Embedding) and layer is model.get_input_embeddings()  # type: ignore[operator]
        shape = self._file.places[name].shape
        if not (type(layer) is nn.Linear or embeds) or tuple(layer.weight.shape) != shape:
            return None
        rows = np.arange(shape[0], dtype=np.int64)
        done = processor.process(weights=rows[:, None].copy(), name=name, tensor_key_mapping={}, parsed_parameters={})
        moved = np.asarray(done.weights)
        if done.name != name or moved.shape != (shape[0], 1) or not np.array_equal(np.sort(moved[:, 0]), rows):
            return None
        return torch.from_numpy(np.ascontiguousarray(moved[:, 0]))

    def _experts_of(self, model: nn.Module, own: str | None, name: str) -> list[str]:
        """Return the tensors that make up one weight of experts, if they can stay packed in this model."""
        parts = _parts_of_experts(self._file, name)
        if own is None or not parts or not _is_packable(self._file, name):
            return []
        weight: Any = model.get_parameter(own)
        experts, columns, depth = self._file.places[name].shape
        return parts if tuple(weight.shape) == (experts, len(parts) * columns, depth) else []

    def _pack(self, handle: Any, name: str, order: Tensor) -> Tensor:
        """Pack a tensor's numbers, and return what stands for them meanwhile."""
        columns, depth = self._file.places[name].shape
        packed = self._keep(name, lambda: self._packed(handle, name, order))
        stand_in, key = self._stand_in((columns, depth))
        self._kept[key] = packed
        return stand_in

    def _packed(self, handle: Any, name: str, order: Tensor) -> PackedWeight:
        groups = self._groups(handle, name, 0, self._file.places[name].shape[0])
        return self._kernels.pack_groups(_reordered(groups, order), None)

    def _pack_experts(self, handle: Any, parts: Sequence[str]) -> Tensor:
        """Pack the numbers of one weight of experts, one expert after the other, and return what stands for them."""
        experts, columns, depth = self._file.places[parts[0]].shape

        def pack(expert: int) -> PackedWeight:
            groups = [self._groups(handle, name, expert * columns, columns) for name in parts]
            return self._kernels.pack_groups(_joined(groups), None)

        packed = [self._keep(f"{parts[0]} {expert}", partial(pack, expert)) for expert in range(experts)]
        stand_in, key = self._stand_in((experts, len(parts) * columns, depth))
        self._experts[key] = packed
        return stand_in

    def _stand_in(self, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """Return what stands for a packed weight, and by what it will be found."""
        # Different numbers: transformers compares weights that could be tied.
        number = torch.full((1,), len(self._stand_ins) + 1, dtype=torch.float32)
        self._stand_ins.append(number)
        return number.expand(shape), number.data_ptr()

    def _groups(self, handle: Any, name: str, first: int, columns: int) -> Groups:
        """Read some columns of a tensor, from the one with number `first` on, all experts' counted."""
        place, kind = self._file.places[name], KINDS[self._file.types[name]]
        depth = place.shape[-1]
        row = kind.row_bytes(depth)

        def rows(part: slice) -> Tensor:
            count = min(part.stop, columns) - part.start
            at = place.offset + (first + part.start) * row
            return torch.from_numpy(_bytes(handle, at, count * row)).view(count, row)

        try:
            return read_groups(kind, columns, depth, rows)
        except NotFinite as error:
            raise LoadError(f"{self._name}: {self._file.path.name} is damaged: {name}: {error}.") from None

    def _widen(self, handle: Any, name: str) -> np.ndarray:
        """Read a tensor as float32, as transformers does."""
        from gguf import GGMLQuantizationType, dequantize

        place = self._file.places[name]
        data = _bytes(handle, place.offset, place.size)
        last = place.size * place.shape[-1] // max(self._file.sizes[name], 1)
        widened: np.ndarray = dequantize(
            data.reshape(*place.shape[:-1], last), GGMLQuantizationType[self._file.types[name]]
        )
        return widened


def _bytes(handle: Any, offset: int, count: int) -> np.ndarray:
    handle.seek(offset)
    data: np.ndarray = np.fromfile(handle, dtype=np.uint8, count=count)
    if data.size != count:
        raise OSError(f"the file ends within a tensor, at byte {offset + data.size}")
    return data


def _joined(parts: Sequence[Groups]) -> Groups:
    """Put the columns of weights of one kind one after the other."""
    tensors: dict[str, Any] = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Groups)
        if isinstance(getattr(parts[0], field.name), Tensor)
    }
    return dataclasses.replace(parts[0], **tensors)


def _reordered(groups: Groups, order: Tensor) -> Groups:
    """Bring the columns of a weight into an order."""
    if torch.equal(order, torch.arange(len(order), dtype=order.dtype)):
        return groups
    tensors: dict[str, Any] = {
        field.name: value[order]
        for field in dataclasses.fields(groups)
        if isinstance(value := getattr(groups, field.name), Tensor)
    }
    return dataclasses.replace(groups, **tensors)


@torch.inference_mode()
def _scale_of(embedding: nn.Embedding) -> Tensor | None:
    """Return what an embedding multiplies its rows with, a float32 scalar; None if it does anything else."""
    table = quasi_random(4, embedding.embedding_dim)
    given: Any = getattr(embedding, "embed_scale", 1.0)
    if not isinstance(given, int | float | Tensor) or (isinstance(given, Tensor) and given.numel() != 1):
        return None
    scale = torch.as_tensor(given).detach().to(torch.float32).reshape(())
    padding, embedding.padding_idx = embedding.padding_idx, None  # would be checked against the small table
    try:
        ids = torch.tensor([[2, 0], [3, 3]], dtype=torch.int64)
        out = torch.func.functional_call(embedding, {"weight": table}, (ids,))
    finally:
        embedding.padding_idx = padding
    return scale if torch.equal(out, table[ids] * scale) else None

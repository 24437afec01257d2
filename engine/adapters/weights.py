"""Read an adapter's tensors, and check every one against the model that it is for.

A file of safetensors with two matrices per layer, `lora_A [rank, in]` and `lora_B [out, rank]`, named as PEFT names
them (`peft.utils.save_and_load`). Nothing pickled is opened. The header is checked before the model is read, and the
tensors once it is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.adapters.patterns import BadPattern
from engine.adapters.settings import AdapterSettings, read_settings
from engine.checkpoints.checkpoint import check_places
from engine.checkpoints.safetensors_file import TensorEntry, read_header
from engine.compute.cpu.stored_linear import StoredLinear
from engine.config import AdapterEntry
from engine.errors import LoadError, NotEnoughMemory
from engine.host_memory import format_bytes, free_memory

__all__ = ["Adapter", "AdapterFiles", "LoraPair", "is_linear", "sizes_of"]

_PICKLED: Final = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_NAME: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A|B)\.weight")
_DTYPES: Final = frozenset({"F32", "F16", "BF16"})
_MOST_TENSORS: Final = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """What an adapter adds to one layer: `scale · B (A x)`. `a`: `[rank, in]`, `b`: `[out, rank]`, both float32."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter whose tensors are read and fit their model. `pairs`: by the name of the layer's module."""

    name: str
    settings: AdapterSettings
    pairs: Mapping[str, LoraPair]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that its layers have, each once, smallest first."""
        return tuple(sorted({pair.rank for pair in self.pairs.values()}))


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of an adapter, checked as far as they can be without its model."""

    entry: AdapterEntry
    settings: AdapterSettings
    tensors: Mapping[str, TensorEntry]
    where: str
    """How errors begin: the entry's id and the adapter's key."""

    @classmethod
    def inspect(cls, entry: AdapterEntry, model_id: str) -> AdapterFiles:
        """Read an adapter's configuration and the header of its weights.

        Raises:
            LoadError: a file is missing, damaged, pickled, or asks for something that is not computed here.
        """
        where, folder = f"{model_id}: adapters.{entry.name}", entry.path
        if not folder.is_dir():
            raise LoadError(f"{where}: the folder {folder} does not exist.")
        config, weights = entry.files
        if not config.exists():
            raise LoadError(f"{where}: {folder} holds no {config.name}: it is no adapter in PEFT's format.")
        check_places(folder, where)
        settings = read_settings(config, where)
        if not weights.exists():
            pickled = next((name for name in _PICKLED if (folder / name).exists()), None)
            hint = f" {pickled} can run code when it is opened and is not loaded; convert it." if pickled else ""
            raise LoadError(f"{where}: {folder} holds no {weights.name}.{hint}")
        tensors = read_header(weights, where)
        if not tensors or len(tensors) > _MOST_TENSORS:
            raise LoadError(f"{where}: {weights.name} has {len(tensors)} tensors; an adapter has 2 to {_MOST_TENSORS}.")
        for key, tensor in tensors.items():
            if not _NAME.fullmatch(key):
                raise LoadError(
                    f"{where}: {weights.name} holds {key[:200]!r}; only lora_A and lora_B of linear layers are served."
                )
            if tensor.dtype not in _DTYPES:
                raise LoadError(f"{where}: {key[:200]} is of type {tensor.dtype[:20]!r}; F32, F16 and BF16 are read.")
        needed, free = 4 * sum(tensor.numel for tensor in tensors.values()), free_memory()
        if needed > free:
            raise NotEnoughMemory(
                f"{where}: the adapter needs {format_bytes(needed)} of memory, {format_bytes(free)} are free.",
                needed=needed,
                free=free,
            )
        return cls(entry, settings, tensors, where)

    def load(self, model: nn.Module) -> Adapter:
        """Read the tensors for a plain model, and check that they are all and only what its layers need.

        Raises:
            LoadError: a layer is not there, is not linear, lacks its adapter, or has another shape or rank; a number is
                not finite.
        """
        modules = dict(model.named_modules())
        names = sorted({found["module"] for key in self.tensors if (found := _NAME.fullmatch(key))})
        try:
            for name in names:
                self._check_layer(name, modules.get(name))
            self._check_covered(model, modules, set(names))
            scales = {name: self.settings.scale_of(name) for name in names}
        except BadPattern as error:
            raise LoadError(f"{self.where}: {self.entry.files[0].name}: {error}") from None
        values = self._read()
        pairs = {name: LoraPair(values[_key(name, "A")], values[_key(name, "B")], scales[name]) for name in names}
        return Adapter(self.entry.name, self.settings, pairs)

    def _check_layer(self, name: str, layer: nn.Module | None) -> None:
        if layer is None:
            raise LoadError(f"{self.where}: the model has no layer {name[:200]!r}: the adapter is another model's.")
        if not is_linear(layer):
            raise LoadError(
                f"{self.where}: {name} is a {type(layer).__name__}, not a plain linear layer: an adapter of it is not "
                "served."
            )
        rank, (columns, depth) = self.settings.rank_of(name), sizes_of(layer)
        for part, shape in (("A", (rank, depth)), ("B", (columns, rank))):
            tensor = self.tensors.get(_key(name, part))
            if tensor is None:
                raise LoadError(f"{self.where}: {self.entry.files[1].name} lacks lora_{part} of {name}.")
            if tensor.shape != shape:
                raise LoadError(
                    f"{self.where}: lora_{part} of {name} has the shape {list(tensor.shape)}; the layer and the rank "
                    f"{rank} want {list(shape)}."
                )

    def _check_covered(self, model: nn.Module, modules: Mapping[str, nn.Module], names: set[str]) -> None:
        """Refuse tensors of layers that the configuration does not name, and layers that it names without tensors."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        for name, module in modules.items():
            if is_linear(module) and self.settings.covers(name, is_head=module is head) != (name in names):
                fault = "does not name it" if name in names else "names it, and it has no tensors"
                raise LoadError(f"{self.where}: {name}: {self.entry.files[0].name} {fault}: the adapter is damaged.")

    def _read(self) -> dict[str, Tensor]:
        from safetensors import safe_open

        values: dict[str, Tensor] = {}
        weights = self.entry.files[1]
        try:
            with safe_open(str(weights), framework="pt") as file:
                for key in self.tensors:
                    values[key] = file.get_tensor(key).to(torch.float32).contiguous()
        except (OSError, ValueError, RuntimeError, _safetensors_error()) as error:
            raise LoadError(f"{self.where}: cannot read {weights.name}: {error}") from None
        for key, value in values.items():
            if not bool(value.isfinite().all()):
                raise LoadError(f"{self.where}: {key} holds a number that is not finite.")
        return values


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer: of floating-point numbers, or one that was loaded packed.

    GPT-2's `Conv1D` is one, transposed.
    """
    if isinstance(module, StoredLinear):
        return True
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return False
    weight: Any = module.weight
    return weight.dim() == 2 and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of results and of inputs of a plain linear layer."""
    if isinstance(layer, StoredLinear):
        return layer.out_features, layer.in_features
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if type(layer).__name__ == "Conv1D" else (rows, columns)


def _key(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_{part}.weight"


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError

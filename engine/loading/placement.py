"""Decide where a model is computed: device, dtype, backend, and whether it fits. Only this file chooses a backend."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from engine.checkpoints import packed_layers, quantized
from engine.checkpoints.checkpoint import Checkpoint
from engine.compute.backend import Backend, Progress
from engine.compute.cpu.backend import CpuBackend
from engine.compute.cpu.kernels import Kernels, NoKernels
from engine.compute.cpu.layers.own_weights import widen_own_weights
from engine.compute.cpu.packed_weight import Keep, make_each
from engine.compute.cpu.stored_linear import widen_layers
from engine.compute.cuda.backend import CudaBackend
from engine.compute.linear import choose_linear
from engine.compute.torch_backend import TorchBackend
from engine.config import ModelConfig
from engine.devices import gpu
from engine.devices.gpu import DeviceMemory
from engine.errors import LoadError, NotEnoughMemory
from engine.host_memory import format_bytes, free_memory
from engine.loading import streams

_LARGE = 2_000_000_000
"""Parameters above which a float32 checkpoint is narrowed on a GPU, unless the entry says otherwise."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a model can be computed in, by the names that entries and checkpoints have for them."""

log = logging.getLogger("verbatim.engine")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model is computed, and in which dtype.

    Attributes:
        device: where logits arrive; device_map: accelerate's, for all modules.
        stored: the checkpoint's dtype; float32 if no model can be computed in that one.
        packs: the checkpoint is quantised, and its layers stay as packed as they are, on one GPU.
        reads: the checkpoint is quantised in a form that is read here, without transformers, on a CPU.
        rounds: how weights are rounded, as in an entry; None: not at all.
    """

    device: torch.device
    device_map: Any
    dtype: torch.dtype
    stored: torch.dtype
    packs: bool = False
    reads: bool = False
    rounds: str | None = None

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def gpus(self) -> tuple[DeviceMemory, ...]:
        """The GPUs that weights may go to: the chosen one, or all where accelerate spreads them; none on a CPU."""
        if self.on_cpu:
            return ()
        return DeviceMemory.of_all() if isinstance(self.device_map, str) else (DeviceMemory(self.device),)

    @property
    def on_one_gpu(self) -> bool:
        """Whether the whole model is on one GPU: there our own kernels may compute it."""
        return self.device.type == "cuda" and not isinstance(self.device_map, str)

    @property
    def has_kernels(self) -> bool:
        """Whether compiled kernels exist for this placement: float32 on a CPU."""
        return self.on_cpu and self.dtype == torch.float32

    @property
    def rounded(self) -> Literal["exact", "int8", "int4"]:
        """How the weights of a model on a GPU are rounded."""
        return "int8" if self.rounds == "int8" else "int4" if self.rounds == "int4" else "exact"

    @property
    def rounds_inputs(self) -> bool:
        """Whether layers round their inputs to bytes, too, which plain transformers does not."""
        return self.has_kernels and self.rounds is not None


def place(config: ModelConfig, found: Checkpoint) -> Placement:
    """Choose device and dtype, and compare needed with free memory before a weight is read.

    Raises:
        LoadError: the device does not exist, or no backend has the entry's quantisation there; NotEnoughMemory.
    """
    device, device_map = _resolve_device(config)
    stored = DTYPES.get(found.dtype, torch.float32)
    rounds = None if config.quantization == "none" else config.quantization
    placement = Placement(device, device_map, _dtype(config, found, device, stored), stored, rounds=rounds)
    on_kernels = placement.on_one_gpu and config.gpu != "no-kernels" and config.quantization != "none"
    if on_kernels and packed_layers.can_stay_packed(found):
        placement = dataclasses.replace(placement, packs=True)
    if placement.has_kernels and found.as_stored_bytes and config.quantization is None and not config.merged_adapter:
        placement = dataclasses.replace(placement, rounds="stored")
    if placement.has_kernels and found.folder.is_dir() and streams.reads_quantised(found):
        stays = config.quantization is None
        placement = dataclasses.replace(placement, reads=True, rounds="stored" if stays else rounds)
    _check_quantization(config, placement)
    _check_memory(config, found, placement)
    return placement


def _dtype(config: ModelConfig, found: Checkpoint, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Choose the dtype to compute in, by the entry, the checkpoint and the kind of device, never by what is free."""
    asked = None if config.dtype == "auto" else DTYPES[config.dtype]
    if device.type == "cpu":
        return asked or torch.float32
    dtype = asked or stored
    if asked is None and stored == torch.float32 and found.parameters > _LARGE:
        dtype = torch.bfloat16
        log.warning(
            "%s: a float32 checkpoint of %.1f billion parameters is computed in bfloat16 on a GPU; dtype: float32 in "
            "its entry keeps every digit, at twice the memory and several times the time",
            config.id,
            found.parameters / 1e9,
        )
    if dtype == torch.bfloat16 and not gpu.computes_bfloat16(device):
        if asked is not None:
            log.warning("%s: %s has no instructions for bfloat16: it is slow there", config.id, device)
            return dtype
        dtype = torch.float16
        log.warning(
            "%s: %s has no instructions for bfloat16: computed in float16, whose largest number is 65504; dtype: "
            "float32 in its entry is for models with larger ones",
            config.id,
            device,
        )
    return dtype


def _check_quantization(config: ModelConfig, placement: Placement) -> None:
    """Refuse a quantisation that the backend of this placement does not have, before a weight is read."""
    asked = config.quantization
    if asked in (None, "none") or asked in _quantizations(placement):
        return
    where = f"not {placement.dtype} on {placement.device}"
    raise LoadError(f"{config.id}: quantization: {asked} is for float32 on a CPU, or for one GPU, {where}.")


def _quantizations(placement: Placement) -> frozenset[str]:
    """Return the quantisations that the backend of a placement has."""
    if placement.on_one_gpu:
        return CudaBackend.QUANTIZATIONS
    return CpuBackend.QUANTIZATIONS if placement.has_kernels else TorchBackend.QUANTIZATIONS


def choose_kernels(config: ModelConfig, found: Checkpoint, placement: Placement, progress: Progress) -> Kernels | None:
    """Load the compiled kernels where there are any for this placement, before a weight is read.

    Raises:
        LoadError: the entry asks for a quantisation that only compiled kernels have, and there are none;
        NotEnoughMemory: without them the model does not fit.
    """
    if not placement.has_kernels:
        return None
    try:
        return Kernels.load(progress=progress)
    except NoKernels as error:
        if placement.rounds in ("int8", "int4"):
            raise LoadError(f"{config.id}: quantization: {placement.rounds} needs compiled kernels: {error}.") from None
        log.warning("%s: no compiled kernels (%s): linear layers run in torch", config.id, error)
    whole = quantized.parameters(config, found) * 4 if placement.reads else found.float32_bytes()
    _check_free(config, whole, placement)
    return None


def choose_backend(
    config: ModelConfig,
    placement: Placement,
    model: nn.Module,
    kernels: Kernels | None,
    progress: Progress,
    keep: Keep = make_each,
) -> Backend:
    """Choose the backend of a model that is not on one GPU: compiled kernels where they exist and compute rightly, else
    torch.

    Args:
        keep: keeps weights that the backend packs for the next start.

    Raises:
        LoadError: the entry asks for a quantisation that only compiled kernels have, and they do not work.
    """
    if not placement.has_kernels:
        return TorchBackend(placement.device)
    if kernels is not None:
        backend = CpuBackend(kernels, placement.rounds, keep)
        if backend.is_sound(model):
            return backend
        if placement.rounds in ("int8", "int4"):
            raise LoadError(f"{config.id}: quantization: {placement.rounds} does not compute rightly on this machine.")
        log.warning("%s: the compiled kernels do not compute rightly here: linear layers run in torch", config.id)
        progress("widening weights")
        widen_layers(model)
        widen_own_weights(model)
    return TorchBackend(placement.device, *choose_linear(model))


def _resolve_device(config: ModelConfig) -> tuple[torch.device, Any]:
    """Return the device on which logits arrive, and accelerate's device map."""
    name = config.device
    if name == "auto":
        name = "cuda" if gpu.count() else "cpu"
        if name == "cpu" and torch.version.cuda:
            log.warning(
                "%s: this build of torch is for CUDA %s and sees no GPU: taking the CPU", config.id, torch.version.cuda
            )
    if name == "cpu":
        return torch.device("cpu"), {"": "cpu"}
    if not gpu.count():
        raise LoadError(
            f"{config.id}: device {config.device!r} was asked for, but torch {torch.__version__} sees no GPU."
        )
    if not name.startswith("cuda"):
        return torch.device("cuda:0"), name
    device = torch.device(name if ":" in name else "cuda:0")
    if (device.index or 0) >= gpu.count():
        raise LoadError(f"{config.id}: there is no {device}; this machine has {gpu.count()} GPU(s).")
    return device, {"": str(device)}


def _check_memory(config: ModelConfig, found: Checkpoint, placement: Placement) -> None:
    dtype = placement.dtype
    if placement.packs:
        needed: int | None = found.stored_bytes
    elif placement.reads:
        needed = _bytes_read(config, found, placement.rounds)
    else:
        needed = quantized.check(config, found, placement.device_map, dtype)
    if needed is None and placement.has_kernels:
        streamed = placement.rounds == "stored" or (found.folder.is_dir() and config.merged_adapter is None)
        needed = found.packed_bytes(placement.rounds) if streamed else found.float32_bytes()
    _check_free(config, found.parameters * dtype.itemsize if needed is None else needed, placement)


def _bytes_read(config: ModelConfig, found: Checkpoint, rounds: str | None) -> int:
    """Estimate the memory of a checkpoint that comes quantised: as it is stored, rounded anew while it is read, or
    widened."""
    if rounds == "stored":
        return found.packed_bytes(rounds)
    parameters = quantized.parameters(config, found)
    return parameters * 4 if rounds is None else dataclasses.replace(found, parameters=parameters).packed_bytes(rounds)


def _check_free(config: ModelConfig, needed: int, placement: Placement) -> None:
    free = free_memory() if placement.on_cpu else sum(memory.free() for memory in placement.gpus)
    if needed > free:
        place = "memory" if placement.on_cpu else "GPU memory"
        rounds = placement.rounds in ("int8", "int4", "stored") and placement.on_cpu
        kind = placement.rounds if rounds else str(placement.dtype).removeprefix("torch.")
        raise NotEnoughMemory(
            f"{config.id}: the weights need {format_bytes(needed)} of {place} as {kind}, "
            f"{format_bytes(free)} are free.",
            needed=needed,
            free=free,
        )

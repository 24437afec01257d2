"""Name a card and the software on it: what the verdict of its checks holds for. Touches the GPU only through torch."""

from __future__ import annotations

import hashlib
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

from engine.types.gpu import GpuVerdict
from engine.types.versions import GPU_KERNELS_VERSION

__all__ = ["card_of", "driver_version"]

_DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")
_SECONDS: Final = 20.0  # for nvidia-smi
_ENGINE: Final = Path(__file__).resolve().parents[2]


def card_of(device: str) -> GpuVerdict:
    """Return a verdict without checks: the card, driver, libraries and kernels. Starts CUDA in this process.

    Args:
        device: `cuda:0`, or `cpu` for a rehearsal without a card.
    """
    import torch

    at = torch.device(device)
    on_gpu = at.type == "cuda"
    return GpuVerdict(
        gpu=torch.cuda.get_device_name(at) if on_gpu else "",
        capability="{}.{}".format(*torch.cuda.get_device_capability(at)) if on_gpu else "",
        driver=driver_version() if on_gpu else "",
        torch=str(torch.__version__),
        triton=_version("triton"),
        kernels=f"{GPU_KERNELS_VERSION} {_kernels_digest()}",
    )


def driver_version() -> str:
    """Return the version of NVIDIA's driver; empty if it does not tell."""
    try:
        said = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:  # in WSL
        said = _nvidia_smi()
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", said)
    return found[0] if found else ""


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _kernels_digest() -> str:
    """Hash the source of the CUDA path and of its trials, so that a verdict never outlives what it is about."""
    digest = hashlib.sha256()
    for folder in (_ENGINE / "compute" / "cuda", _ENGINE / "loading" / "gpu"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(_ENGINE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]

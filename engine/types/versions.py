"""Versions of this project and of what it computes by rules of its own. Each is a part of the fingerprint.

A version is raised by hand whenever a change may give the same request another result, and only then. Golden vectors in
`tests/engine/golden` fail where a result changed and the version did not; CONTRIBUTING.md says what to do then.
"""

from __future__ import annotations

from typing import Final

PROJECT_VERSION: Final = "0.1.0"
"""The release, as in pyproject.toml."""

SAMPLER_VERSION: Final = 1
"""Raised when the same logits, parameters, seed, choice and position may give another token or log-probability."""

PROMPT_FORMAT_VERSION: Final = 2
"""Raised when the same messages, tools and template may give other token ids: what templates are told, how content is
kept apart from control tokens, how tools are explained to models whose template knows none."""

REPLY_FORMAT_VERSION: Final = 2
"""Raised when the same tokens may give another reply: how text is decoded, cut at stop strings, split into thoughts,
calls and answer, how a grammar is made of a schema, and how forced text is spelled."""

CPU_KERNELS_VERSION: Final = 6
"""Raised when a forward pass on a CPU may have other bits: compiled kernels, attention and linear layers in torch."""

ADAPTERS_VERSION: Final = 1
"""Raised when the same model with the same adapter may have other bits: how adapters are merged or computed beside it.
A part only where there is an adapter."""

GPU_KERNELS_VERSION: Final = 5
"""Raised when a forward pass on a GPU may have other bits: the Triton kernels, attention and linear layers in torch."""

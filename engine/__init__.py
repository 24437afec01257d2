"""verbatim's engine: tokens in, tokens out, every bit of them reproducible. Knows nothing of HTTP, keys or money.

The public names are listed once, in `__init__.pyi`. Each is imported when it is first used, so that `import engine`
costs no torch.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
from pathlib import Path
from typing import Any

# torch's OpenMP threads spin for milliseconds after each of its operations, on processors that the kernels' team needs
# (docs/decisions/0041-a-thread-team.md). OpenMP reads this when torch is imported, which is later than this line.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"


@functools.cache
def _module_of() -> dict[str, str]:
    """The public names, and the module that defines each."""
    # importlib.resources would import what takes longer than all else here.
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module or "" for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name not in _module_of():
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_module_of()[name]), name)


def __dir__() -> list[str]:
    return sorted(_module_of())

"""torch's default dtype belongs to the whole process, and transformers changes it while it loads a model.

A tensor that is made without a dtype has another one then; a kernel that writes into it writes beyond its end.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "engine").rglob("*.py"))
MAKERS = {"empty", "zeros", "ones", "full", "eye", "linspace", "rand", "tensor", "scalar_tensor", "empty_strided"}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_every_tensor_is_made_with_a_dtype(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in MAKERS
        ):
            named = any(keyword.arg in ("dtype", None) for keyword in node.keywords)
            assert named, f"{path.relative_to(ROOT)}:{node.lineno}: torch.{node.func.attr} without a dtype"

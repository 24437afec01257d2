"""The page of models.yaml: every key, from the settings' classes."""

from __future__ import annotations

import ast
import inspect
import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.pages.markdown import NOTE, table, type_name
from engine import ModelConfig
from engine.config import AdapterEntry
from server.settings import ReceiptSettings, ServerSettings


def models_yaml() -> str:
    return (
        f"{NOTE}# models.yaml\n\n"
        "Two keys at the top: `models`, a list of entries, and `server`, a mapping. An unknown key is an error that "
        "names the nearest known one. Relative paths are taken from the folder of the file.\n\n"
        "```yaml\nmodels:\n  - id: qwen3\n    path: /models/Qwen3-0.6B\n    context_length: 8192\n"
        "    cache_size: 2GiB\n    sampling: {temperature: 0.7}\nserver:\n  port: 9000\n```\n\n"
        "## models\n\n"
        f"An entry gives `id` and exactly one of `path`, `repo` and `builtin`.\n\n{_keys(ModelConfig)}\n"
        f"### adapters\n\nSee [LoRA adapters](../guides/adapters.md).\n\n{_keys(AdapterEntry)}\n"
        f"## server\n\n{_keys(ServerSettings)}\n"
        f"### receipts\n\nSee [Keeping receipts](../guides/keeping-receipts.md).\n\n{_keys(ReceiptSettings)}"
    )


def _keys(model: type[BaseModel]) -> str:
    said = _attribute_docstrings(model)
    hints = typing.get_type_hints(model)
    rows = [
        (f"`{name}`", type_name(hints[name]), _default(field), said.get(name, ""))
        for name, field in model.model_fields.items()
    ]
    return table(("key", "type", "default", "meaning"), rows)


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The strings that stand under a class's attributes, which Python itself does not keep."""
    [tree] = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        match node, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    limits = "".join(
        f", {sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"))
        if hasattr(item, name)
    )
    value = field.get_default(call_default_factory=True)
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
    if value == ():
        return "none"
    return ("" if value is None else f"`{shown}`") + (limits if value is not None else limits.removeprefix(", "))

"""`tell_apart`: names the member by which the alternatives of a `oneOf` differ, so that "exactly one" can be enforced.

The compiler of grammars can prove that alternatives exclude each other where it is told their tag, as OpenAPI tells it:
https://spec.openapis.org/oas/v3.1.1#discriminator-object
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.text.json_schema import choices_of, parts, resolved

__all__ = ["tell_apart"]


def tell_apart(schema: Any) -> None:
    """Write `discriminator` beside each `oneOf` whose alternatives a tag tells apart; change the schema in place.

    Where a request names the tag itself, it is required in each alternative, as OpenAPI demands and pydantic checks
    (its schemas do not require a tag that has a default).
    """
    for _, part in list(parts(schema)):
        if not isinstance(part, dict):
            continue
        told = part.pop("discriminator", None)
        if not isinstance(part.get("oneOf"), list):
            continue
        name = told.get("propertyName") if isinstance(told, Mapping) else None
        branches = [resolved(branch, schema) for branch in part["oneOf"]]
        first = branches[0].get("properties", {}) if isinstance(branches[0], Mapping) else {}
        for tag in [name] if isinstance(name, str) else first:
            if not _differ(branches, tag, schema):
                continue
            missing = [tag not in branch.get("required", ()) for branch in branches]
            if any(missing) and tag != name:
                continue
            part["discriminator"] = {"propertyName": tag}
            part["oneOf"] = [
                {**branch, "required": [*branch.get("required", ()), tag]} if lacks else branch
                for branch, lacks in zip(part["oneOf"], missing, strict=True)
            ]
            break
        else:
            if isinstance(name, str):
                part["discriminator"] = {"propertyName": name}  # alternatives may be unions themselves


def _differ(branches: list[Any], tag: str, root: Any) -> bool:
    """Whether each alternative is an object with texts of its own for a member."""
    seen: set[str] = set()
    for branch in branches:
        members = branch.get("properties", {}) if isinstance(branch, Mapping) and branch.get("type") == "object" else {}
        values = choices_of(members.get(tag), root)
        if values is None or not all(isinstance(value, str) for value in values) or seen & {*values}:
            return False
        seen |= {*values}
    return True

"""`tell_apart`: names the member by which the alternatives of a `oneOf` differ, so that "exactly one" can be enforced.

The compiler of grammars can prove that alternatives exclude each other where it is told their tag, as OpenAPI tells it:
https://spec.openapis.org/oas/v3.1.1#discriminator-object
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from engine.text.json_schema import choices_of, resolved, subschemas

__all__ = ["tell_apart"]

_STEPS: Final = 30_000  # to find the tags of one schema: alternatives, references and values that are looked at


def tell_apart(schema: Any) -> None:
    """Write `discriminator` beside each `oneOf` whose alternatives a tag tells apart; change the schema in place.

    Where a request names the tag itself, it is required in each alternative, as OpenAPI demands and pydantic checks
    (its schemas do not require a tag that has a default). The search is bounded by a count; a `oneOf` that it does not
    reach is one whose alternatives nothing tells apart.
    """
    left = [_STEPS]
    for part in list(subschemas(schema)):
        if not isinstance(part, dict):
            continue
        told = part.pop("discriminator", None)
        if not isinstance(part.get("oneOf"), list):
            continue
        name = told.get("propertyName") if isinstance(told, Mapping) else None
        branches = [resolved(branch, schema, left) for branch in part["oneOf"]]
        tags: Iterable[str] = [name] if isinstance(name, str) else _required_in_all(branches, left)
        for tag in tags:
            if left[0] < 0:
                break
            if not _differ(branches, tag, schema, left):
                continue
            part["discriminator"] = {"propertyName": tag}
            part["oneOf"] = [
                {**own, "required": [*own.get("required", ()), tag]} if tag not in branch.get("required", ()) else own
                for own, branch in zip(part["oneOf"], branches, strict=True)
            ]
            break
        else:
            if isinstance(name, str):
                part["discriminator"] = {"propertyName": name}  # alternatives may be unions themselves


def _required_in_all(branches: list[Any], left: list[int]) -> list[str]:
    """Return the members of the first alternative that all alternatives require, in their order."""
    common: set[str] | None = None
    for branch in branches:
        said = branch if isinstance(branch, Mapping) else {}
        left[0] -= 1 + len(said.get("required", ()))
        if left[0] < 0:
            return []
        common = {*said.get("required", ())} if common is None else common.intersection(said.get("required", ()))
        if not common:
            return []
    return [name for name in branches[0].get("properties", {}) if name in (common or ())]


def _differ(branches: list[Any], tag: str, root: Any, left: list[int]) -> bool:
    """Whether each alternative is an object with texts of its own for a member, one text at least."""
    seen: set[str] = set()
    for branch in branches:
        left[0] -= 1
        if left[0] < 0:
            return False
        members = branch.get("properties", {}) if isinstance(branch, Mapping) and branch.get("type") == "object" else {}
        values = choices_of(members.get(tag), root, left)
        if not values or not all(isinstance(value, str) for value in values) or seen & {*values}:
            return False
        seen |= {*values}
    return True

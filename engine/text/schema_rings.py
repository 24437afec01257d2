"""`unending`: finds the `$ref` through which a JSON schema demands itself for ever, so that no value satisfies it.

A ring of references is harmless where a value may end: at an optional member, an empty list, another alternative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.text.json_schema import parts, subschemas, target_of

__all__ = ["unending"]


def unending(schema: Any) -> str | None:
    """Return the JSON pointer of the last part whose `$ref` no finite value satisfies; None if there is none."""
    references = {part["$ref"]: False for part in subschemas(schema) if _refers(part)}
    if not references:
        return None
    targets = {reference: target_of(reference, schema) for reference in references}
    changed = True
    while changed:  # the least set of references that end: each round looks one reference further
        changed = False
        for reference, ends in references.items():
            if not ends and (targets[reference] is None or _ends(targets[reference], references)):
                references[reference] = changed = True
    found = [pointer for pointer, part in parts(schema) if _refers(part) and not references[part["$ref"]]]
    return found[-1] if found else None


def _refers(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("$ref"), str)


def _ends(part: Any, references: Mapping[str, bool]) -> bool:
    """Whether a finite value may satisfy a part, as far as its references are known to end."""
    if not isinstance(part, Mapping):
        return True
    if _refers(part) and not references[part["$ref"]]:
        return False
    if not all(_ends(one, references) for one in part.get("allOf", ())):
        return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in part and not any(_ends(one, references) for one in part[keyword]):
            return False
    if part.get("type") == "object":
        members = part.get("properties", {})
        return all(_ends(members.get(name), references) for name in part.get("required", ()))
    if part.get("type") == "array":
        least, first = part.get("minItems", 0), part.get("prefixItems", ())
        if not all(_ends(one, references) for one in first[:least]):
            return False
        return least <= len(first) or _ends(part.get("items"), references)
    return True

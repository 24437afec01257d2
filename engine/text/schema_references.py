"""`References`: what `$ref` and its kin name in a JSON schema, as JSON pointers. Pure; fetches nothing.

Identifiers (`$id`, `id`, `$anchor`, `$dynamicAnchor`) are resolved as RFC 3986 and draft 2020-12 say, within one
document: there is one part for each dynamic anchor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from engine.text.json_schema import decoded, pointed
from engine.text.schema_keywords import LISTS, MAPS, SCHEMAS

__all__ = ["References"]


class References:
    """The places of a document where schemas are, and the identifiers that name them."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._bases: dict[str, tuple[str, str]] = {}  # pointer of a schema → its base: an identifier, a pointer
        self._named: dict[str, str] = {}  # identifiers with or without anchors → pointers
        for pointer, part, base in _places(root, "", ("", "")):
            self._bases[pointer] = base
            self._named.setdefault(base[0], base[1])
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(part, Mapping) and isinstance(part.get(keyword), str):
                    self._named.setdefault(f"{base[0]}#{part[keyword]}", pointer)

    def pointer(self, reference: str, at: str) -> str | None:
        """Return the pointer of what a reference, in the schema at a pointer, names; None if nothing here is it."""
        base, _ = self._bases.get(at, ("", ""))
        resource, _, fragment = _joined(base, reference).partition("#")
        if not fragment or fragment.startswith("/"):
            found = self._named.get(resource)
            if not found and resource in ("", base):
                found = self._named.get(base, "")
            return None if found is None else found + decoded(fragment)
        return self._named.get(f"{resource}#{decoded(fragment)}")

    def is_schema(self, pointer: str) -> bool:
        """Whether a schema is where a pointer points, as one of the document's own parts."""
        return pointer in self._bases

    def moved(self, pointer: str) -> str:
        """Return where a part of the document is, once a list of `items` has become `prefixItems`."""
        steps = pointer.split("/")
        for i in range(2, len(steps)):
            before = "/".join(steps[: i - 1])
            if steps[i - 1] == "items" and steps[i].isdigit() and before in self._bases:
                steps[i - 1] = "prefixItems"
        return "/".join(steps)


def _joined(base: str, reference: str) -> str:
    """Resolve a reference against a base (RFC 3986, 5.2), without dots for steps up."""
    if not base or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", reference):
        return reference
    if not reference or reference.startswith("#"):
        return base + reference
    if reference.startswith("/"):
        return (re.match(r"([A-Za-z][A-Za-z0-9+.-]*:)?(//[^/]*)?", base) or [""])[0] + reference
    return base[: base.rfind("/") + 1] + reference


def _places(part: Any, pointer: str, base: tuple[str, str]) -> Iterator[tuple[str, Any, tuple[str, str]]]:
    """Yield the pointer, the schema and the base of each schema in a document, outer ones first."""
    if isinstance(part, Mapping) and "$ref" not in part:
        own = part.get("$id")
        if isinstance(own, str) and own and not own.startswith("#"):
            base = _joined(base[0], own).partition("#")[0], pointer
    yield pointer, part, base
    if not isinstance(part, Mapping):
        return
    for keyword, value in part.items():
        here = f"{pointer}/{pointed(keyword)}"
        if keyword in MAPS and isinstance(value, Mapping):
            for name, one in value.items():
                yield from _places(one, f"{here}/{pointed(name)}", base)
        elif (keyword in LISTS or keyword == "items") and isinstance(value, list):
            for i, one in enumerate(value):
                yield from _places(one, f"{here}/{i}", base)
        elif keyword in SCHEMAS:
            yield from _places(value, here, base)

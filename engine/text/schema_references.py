"""`References`: what `$ref` and its kin name in a JSON schema, as places. Pure; fetches nothing.

A place is the steps of a JSON pointer, as a tuple: however long a name is, the places under it share it.

Identifiers (`$id`, `id` of draft 4) and anchors (`$anchor`, `$dynamicAnchor`, older: an identifier `#name`) are
resolved as RFC 3986 and draft 2020-12 say, within one document. What a dynamic reference names depends on the path to
it where a document has its anchor twice: such a reference names nothing here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from engine.text.json_schema import decoded
from engine.text.schema_keywords import LISTS, MAPS, SCHEMAS

__all__ = ["LongIdentifierError", "Place", "References", "found_at"]

Place = tuple[str, ...]

_LONGEST: Final = 2_048
"""Characters of an identifier: as many are held for each schema that has one relative to it."""


class LongIdentifierError(ValueError):
    """An identifier is too long. Its arguments: the place, why."""


def found_at(root: Any, place: Place) -> Any:
    """Return what is at a place.

    Raises:
        LookupError, ValueError: nothing is there.
    """
    for step in place:
        if isinstance(root, list):
            if not step.isdecimal():
                raise LookupError(step)
            root = root[int(step)]
        elif isinstance(root, Mapping):
            root = root[step]
        else:
            raise LookupError(step)
    return root


class References:
    """The places of a document where schemas are, and the identifiers that name them.

    Raises:
        LongIdentifierError: an identifier is too long.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._bases: dict[Place, str] = {}  # of schemas
        self._named: dict[tuple[str, str], Place] = {}  # by identifier and anchor
        self._old: set[str] = set()  # identifiers of `id`
        self._dynamic: Counter[str] = Counter()
        for place, part, base in self._places(root, (), ""):
            self._bases[place] = base
            if isinstance(part, Mapping):
                self._note(part, place, base)

    def place(self, reference: str, at: Place) -> Place | None:
        """Return the place of the schema that a reference, in the schema at a place, names; None if nothing is it."""
        base = self._bases.get(at, self._bases[()])
        resource, _, fragment = _joined(base, reference).partition("#")
        if fragment and not fragment.startswith("/"):
            return self._named.get((resource, decoded(fragment)))
        steps = _steps(decoded(fragment))
        # Whoever writes `id` for a name of his own means the document by `#`.
        others = [""] if base in self._old and reference.startswith("#") else []
        for one in (resource, *others):
            start = self._named.get((one, ""))
            if start is not None and self._is_schema((*start, *steps)):
                return (*start, *steps)
        return None

    def dynamic(self, keyword: str, reference: str, at: Place) -> Place | None:
        """Return what a `$dynamicRef` or `$recursiveRef` names; None also if there are several."""
        anchor = keyword if keyword == "$recursiveRef" else decoded(reference.partition("#")[2])
        return None if self._dynamic[anchor] > 1 else self.place(reference, at)

    def _is_schema(self, place: Place) -> bool:
        try:
            return isinstance(found_at(self._root, place), Mapping | bool)
        except (LookupError, ValueError):
            return False

    def _note(self, part: Mapping[str, Any], place: Place, base: str) -> None:
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(part.get(keyword), str):
                self._named.setdefault((base, part[keyword]), place)
        if isinstance(part.get("$dynamicAnchor"), str):
            self._dynamic[part["$dynamicAnchor"]] += 1
        self._dynamic["$recursiveRef"] += part.get("$recursiveAnchor") is True
        anchor = _identifier(part).partition("#")[2]
        if anchor and not anchor.startswith("/"):
            self._named.setdefault((base, decoded(anchor)), place)

    def _places(self, part: Any, place: Place, base: str) -> Iterator[tuple[Place, Any, str]]:
        """Yield the place, the schema and the identifier of each schema in a document, outer ones first."""
        if not place:
            self._named["", ""] = ()
        if isinstance(part, Mapping) and (own := _identifier(part)) and not own.startswith("#"):
            base = _joined(base, own).partition("#")[0]
            if len(base) > _LONGEST:
                keyword = "$id" if isinstance(part.get("$id"), str) else "id"
                raise LongIdentifierError(
                    (*place, keyword), f"an identifier of {len(base):,} characters; at most {_LONGEST:,} are allowed"
                )
            self._named.setdefault((base, ""), place)
            if not isinstance(part.get("$id"), str):
                self._old.add(base)
        yield place, part, base
        if not isinstance(part, Mapping):
            return
        for keyword, value in part.items():
            if (keyword in MAPS or keyword == "dependencies") and isinstance(value, Mapping):
                for name, one in value.items():
                    yield from self._places(one, (*place, keyword, name), base)
            elif (keyword in LISTS or keyword == "items") and isinstance(value, list):
                for i, one in enumerate(value):
                    yield from self._places(one, (*place, keyword, str(i)), base)
            elif keyword in SCHEMAS:
                yield from self._places(value, (*place, keyword), base)


def _identifier(part: Mapping[str, Any]) -> str:
    """Return the identifier of a schema; beside a `$ref` there is none."""
    own = part.get("$id", part.get("id"))
    return own if isinstance(own, str) and "$ref" not in part else ""


def _steps(pointer: str) -> Place:
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:])


def _joined(base: str, reference: str) -> str:
    """Resolve a reference against a base. https://www.rfc-editor.org/rfc/rfc3986#section-5.2"""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", reference):
        return reference
    if not reference or reference.startswith("#"):
        return base + reference
    path, hash_, fragment = reference.partition("#")
    root = (re.match(r"([A-Za-z][A-Za-z0-9+.-]*:)?(//[^/]*)?", base) or [""])[0]
    if path.startswith("//"):
        return f"{root.partition('//')[0]}{path}{hash_}{fragment}"
    if not path.startswith("/"):
        above = base[len(root) : base.rfind("/") + 1] if base.rfind("/") >= len(root) else "/" if "//" in root else ""
        path = above + path
    return f"{root}{_without_dots(path)}{hash_}{fragment}"


def _without_dots(path: str) -> str:
    """Take the steps `.` and `..` of a path (RFC 3986, 5.2.4)."""
    kept: list[str] = []
    steps = path.split("/")
    for i, step in enumerate(steps):
        if step not in (".", ".."):
            kept.append(step)
            continue
        if step == ".." and kept and kept != [""]:
            kept.pop()
        if i == len(steps) - 1:
            kept.append("")
    return "/".join(kept)

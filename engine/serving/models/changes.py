"""`Changes`: what a changed configuration changed."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Changes"]


@dataclass(slots=True)
class Changes:
    """What a changed configuration changed, by ids."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    in_place: list[str] = field(default_factory=list)
    tried_again: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        named = {
            "new": self.added,
            "removed": self.removed,
            "replaced": self.replaced,
            "changed in place": self.in_place,
            "tried again": self.tried_again,
        }
        return "; ".join(f"{what}: {', '.join(ids)}" for what, ids in named.items() if ids) or "no model has changed"

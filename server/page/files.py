"""Reads the page's built files once: each one's bytes, type and headers. Knows no request.

The page loads nothing but its own files, and it writes what a model said as text only. Its policy has the browser hold
both: no other origin, no inline script or style, and no text that becomes HTML or script (trusted types).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["BUILT", "POLICY", "PageFile", "read_page"]

BUILT: Final = Path(__file__).with_name("built")
"""What `make web` writes."""

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""The page's Content-Security-Policy."""

_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FOREVER: Final = "public, max-age=31536000, immutable"
_GUARDS: Final = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file as it is sent."""

    body: bytes
    headers: Mapping[str, str]


def read_page(folder: Path = BUILT) -> dict[str, PageFile]:
    """Return the files by path: the page at `/`, what it loads under `/assets/`. Empty if nothing was built.

    The names under `/assets/` hold a digest of the content, so that they are kept for ever; the page is asked for anew.
    """
    page = folder / "index.html"
    if not page.is_file():
        return {}
    found = {"/": _file(page, "no-cache")}
    for file in sorted((folder / "assets").iterdir()):
        if file.suffix in _TYPES:
            found[f"/assets/{file.name}"] = _file(file, _FOREVER)
    return found


def _file(path: Path, cached: str) -> PageFile:
    return PageFile(path.read_bytes(), {**_GUARDS, "content-type": _TYPES[path.suffix], "cache-control": cached})

"""Compare installed libraries with the versions that this release was tried with.

`tried.json` is written with the lock (`make lock`): the libraries that the bits or the meaning of a reply depend on,
and the releases that the test suite ran with. Knows metadata of packages; imports none of them.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

log = logging.getLogger("verbatim.engine")

TRIED = Path(__file__).with_name("tried.json")


def tried() -> dict[str, tuple[str, ...]]:
    """Return the locked releases, by library."""
    return {name: tuple(releases) for name, releases in json.loads(TRIED.read_text(encoding="utf-8")).items()}


def untried() -> dict[str, str]:
    """Return installed versions outside the tried ones, by library; a library that is not installed is left out.

    The build of a release (`+cpu`, `+cu130`) is not compared: it is in the fingerprint in any case.
    """
    found = {}
    for name, releases in tried().items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version.partition("+")[0] not in releases:
            found[name] = version
    return found


def describe(found: Mapping[str, str]) -> str:
    """Write `untried()` as part of a sentence: `torch 2.12.1 (tried: 2.13.0), numpy 2.3.0 (tried: 2.4.6)`."""
    known = tried()
    return ", ".join(f"{name} {version} (tried: {' '.join(known[name])})" for name, version in found.items())


@functools.cache
def warn_of_untried() -> None:
    """Log one line if a library is outside the tried versions; once in a process, however many models it loads."""
    if found := untried():
        log.warning(
            "libraries outside the versions that were tried: %s. The fingerprint says so; install the lock for the "
            "tried ones.",
            describe(found),
        )

"""Checks a bundle: every file is what the checksums say, nothing is missing and nothing else is there.

Trusts nothing that it reads. Installs, loads and runs nothing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from engine import ConfigError, parse_models, read_yaml
from server.bundle.checksums import FILE, digest_of, read_checksums, tree

__all__ = ["PARTS", "check_bundle", "normal"]

PARTS: Final = ("README.txt", "install.sh", "requirements.txt")
"""Files that every bundle has, the checksums aside."""

_PIN: Final = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+) --hash=sha256:([0-9a-f]{64})")
_SMALL: Final = 4 * 2**20
"""Bytes of the longest text file that is read as a whole."""


def check_bundle(root: Path) -> Iterator[str]:
    """Yield one sentence for each fault of a bundle; nothing if it is as it was written."""
    try:
        text = _text(root / FILE)
    except (OSError, ValueError) as error:
        yield f"{root} is not a bundle: cannot read {FILE}: {_why(error)}."
        return
    expected, faults = read_checksums(text)
    yield from faults
    unread: list[OSError] = []
    found = dict(tree(root, unread.append))
    yield from (f"{error.filename} cannot be read: {_why(error)}." for error in unread)
    for name in sorted({*expected, *PARTS} - set(found)):
        yield f"{name} is missing."
    for name in sorted(set(found) - set(expected) - {FILE}):
        yield f"{name} is not in {FILE}."
    for name, regular in found.items():
        if not regular:
            yield f"{name} is no regular file."
        elif name in expected:
            try:
                if digest_of(root / name) != expected[name]:
                    yield f"{name} is not what {FILE} says: its content has changed."
            except OSError as error:
                yield f"{name} cannot be read: {_why(error)}."
    regular_files = {name: expected.get(name, "") for name, regular in found.items() if regular}
    if "requirements.txt" in regular_files:
        yield from _wheels(root, regular_files)
    if "models.yaml" in regular_files:
        yield from _models(root, regular_files)
    elif "models.yaml" not in expected and any(name.startswith("models/") for name in found):
        yield "models.yaml is missing: there are models, and nothing says which are served."


def _wheels(root: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Compare the wheels with the requirements. `files`: the checksum of each regular file."""
    try:
        lines = _text(root / "requirements.txt").splitlines()
    except (OSError, ValueError) as error:
        yield f"requirements.txt cannot be read: {_why(error)}."
        return
    wheels: dict[tuple[str, str], list[str]] = {}
    for name in files:
        if name.startswith("wheels/"):
            package, version, *_ = (*name.removeprefix("wheels/").split("-"), "")
            wheels.setdefault((normal(package), version), []).append(name)
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        match = _PIN.fullmatch(line)
        if match is None:
            yield f"requirements.txt: line {number} is not a release with one hash."
            continue
        held = wheels.pop((normal(match[1]), match[2]), [])
        if not held:
            yield f"requirements.txt: there is no wheel of {match[1]} {match[2]}."
        for name in held:
            if files[name] != match[3]:
                yield f"{name} has another hash than requirements.txt says."
    for name in sorted(name for held in wheels.values() for name in held):
        yield f"{name} is not in requirements.txt."


def _models(root: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Check that every path in models.yaml is a relative one, to something in the bundle."""
    try:
        data = read_yaml(root / "models.yaml")
        entries = parse_models(data.get("models"), base=root, where="models.yaml")
    except ConfigError as error:
        yield error.message
        return
    for entry, parsed in zip(data["models"], entries, strict=True):
        for key in ("path", "chat_template", "response_template"):
            given = entry.get(key)
            if given is None and key != "path":
                continue
            if not isinstance(given, str):
                yield f"models.yaml: the entry {entry['id']!r} does not say where its model lies in this folder."
            elif not any(name == given or name.startswith(f"{given}/") for name in files):
                yield f"models.yaml: {key}: {given} is not in this folder."
        for adapter in parsed.adapters:
            yield from (
                f"models.yaml: adapters: {file} is not in this folder."
                for file in adapter.files
                if os.path.relpath(file, os.path.abspath(root)) not in files
            )


def _text(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # no pipe is waited for
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        raw = file.read(_SMALL + 1)
    if len(raw) > _SMALL:
        raise ValueError(f"it has more than {_SMALL} bytes")
    return raw.decode()


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def normal(package: str) -> str:
    """Return a package's name as the index spells it."""
    return re.sub(r"[-_.]+", "-", package).lower()

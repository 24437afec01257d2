"""Print the parts of a fingerprint, and compare two of them. The files come from anywhere and are read within bounds.

A file holds what `verbatim fingerprint --json` prints or what `GET /v1/models/{id}` answers. Loads no model.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine import fingerprint_of, part_differences
from server.json_text import load_text, to_json
from server.logs import printable

if TYPE_CHECKING:
    from engine import ModelInfo, Parts

__all__ = ["DIFFERENT", "SAME", "UNREADABLE", "as_json", "compare", "lines_of"]

SAME: Final = 0
DIFFERENT: Final = 1
UNREADABLE: Final = 2
"""Exit codes of a comparison."""

_MOST_BYTES: Final = 4 << 20
_MOST_PARTS: Final = 1000
_KINDS: Final = (
    ("system_fingerprint", "fingerprint_parts", "vb-"),
    ("defaults_fingerprint", "default_parts", "vd-"),
)
"""For both kinds: the names of the digest and of the parts, and how a digest begins."""

_Model = dict[str, Any]


class _Unreadable(Exception):
    """A file holds no fingerprint; the message says why, in one sentence."""


def as_json(models: Sequence[ModelInfo]) -> str:
    """Write models' fingerprints and parts as one JSON object: the model's, or a list of several as the API has it.

    The adapters that are served beside a model follow it.
    """
    found = [
        {
            "id": info.id,
            "object": "model",
            "system_fingerprint": info.system_fingerprint,
            "fingerprint_parts": dict(info.fingerprint_parts),
            "defaults_fingerprint": info.defaults_fingerprint,
            "default_parts": dict(info.default_parts),
        }
        for model in models
        for info in (model, *model.adapters.values())
    ]
    return to_json(found[0] if len(found) == 1 else {"object": "list", "data": found})


def lines_of(info: ModelInfo) -> list[str]:
    """Return a model's id, its two fingerprints, and under each its parts, one a line; then those of its adapters."""
    digests = (
        ("fingerprint", info.system_fingerprint, info.fingerprint_parts),
        ("defaults", info.defaults_fingerprint, info.default_parts),
    )
    lines = [_plain(info.id)]
    for kind, digest, parts in digests:
        width = max(map(len, parts), default=0)
        lines.append(f"  {kind} {digest}")
        lines += [f"    {name:<{width}}  {_plain(_shown(parts[name]))}" for name in sorted(parts)]
    return lines + [line for adapter in info.adapters.values() for line in lines_of(adapter)]


def compare(first: Path, second: Path) -> tuple[int, list[str]]:
    """Compare the fingerprints in two files. Returns the exit code and the lines to print.

    Models are compared by id; where each file holds one model, their ids do not matter.
    """
    try:
        one, other = _read(first), _read(second)
    except _Unreadable as error:
        return UNREADABLE, [_plain(str(error))]
    if len(one) == len(other) == 1:
        pairs = {"": (*one.values(), *other.values())}
    else:
        pairs = {name: (one[name], other[name]) for name in one if name in other}
    lines = [f"only in the first: the model {name}" for name in one if pairs.keys().isdisjoint({name, ""})]
    lines += [f"only in the second: the model {name}" for name in other if pairs.keys().isdisjoint({name, ""})]
    for name, (left, right) in pairs.items():
        head = f"{name}: " if name else ""
        for (_, parts, _), kind in zip(_KINDS, ("", "defaults: "), strict=True):
            lines += [f"{head}{kind}{sentence}" for sentence in part_differences(left[parts], right[parts])]
    return (DIFFERENT if lines else SAME), [_plain(line) for line in lines] or ["The fingerprints are the same."]


def _plain(text: str) -> str:
    """Escape what a terminal would interpret, and halves of characters, which cannot be printed."""
    return printable(text.encode(errors="backslashreplace").decode())


def _shown(value: object) -> str:
    return value if isinstance(value, str) and value.strip() else json.dumps(value)


def _read(path: Path) -> Mapping[str, _Model]:
    """Read the models of a file, by id."""
    try:
        data = load_text(_content(path).decode())
    except OSError as error:
        raise _Unreadable(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise _Unreadable(f"{path} is not UTF-8.") from None
    except ValueError as error:
        raise _Unreadable(f"{path} is not JSON that can be read: {error}.") from None
    listed = data.get("data") if isinstance(data, dict) else None
    found = listed if isinstance(listed, list) else [data]
    models = [_checked(item, path) for item in found]
    by_id = {str(model.get("id", "")): model for model in models}
    if len(by_id) < len(models):
        raise _Unreadable(f"{path} holds several models of one id.")
    return by_id


def _content(path: Path) -> bytes:
    """Read a regular file of at most `_MOST_BYTES`; no pipe is waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Unreadable(f"{path} is no regular file.")
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise _Unreadable(f"{path} has more than {_MOST_BYTES >> 20} MiB; no fingerprint has.")
    return content


def _checked(model: Any, path: Path) -> _Model:
    """Check that parts are parts, and that the digests are theirs: a file may have been edited."""
    if not isinstance(model, dict) or not all(isinstance(model.get(parts), dict) for _, parts, _ in _KINDS):
        raise _Unreadable(
            f"{path} holds no fingerprint_parts and default_parts: give what verbatim fingerprint --json prints, or "
            "what GET /v1/models/ID answers."
        )
    for name, parts, prefix in _KINDS:
        values = model[parts]
        if len(values) > _MOST_PARTS:
            raise _Unreadable(
                f"{path} holds {len(values)} parts in {parts}; no fingerprint has more than {_MOST_PARTS}."
            )
        if any(isinstance(value, dict | list) for value in values.values()):
            raise _Unreadable(f"{path} holds a list or an object in {parts}; a part is a text, a number or null.")
        if _digest(values, prefix) != model.get(name):
            raise _Unreadable(f"{path} holds {parts} of another fingerprint than the {name} beside them.")
    return model


def _digest(parts: Parts, prefix: str) -> str | None:
    try:
        return fingerprint_of(parts, prefix)
    except ValueError:  # half a character, a number that JSON does not have
        return None

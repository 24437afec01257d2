"""Look at the configuration: its files, the models that it names, the port, the ledger, receipts. Loads no model."""

from __future__ import annotations

import importlib.util
import os
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from engine import VerbatimError, format_bytes, free_memory
from server.accounts.location import existing, refuse_strangers
from server.commands.doctor.finding import Finding, fault, ok, warn
from server.commands.listing import listed
from server.configuration import DEFAULT_CONFIG, read_configuration
from server.wire.listener import bind

if TYPE_CHECKING:
    from engine import ModelConfig
    from server.settings import ServerSettings

__all__ = ["look_at_setup"]


def look_at_setup(config: Path | None) -> Iterator[Finding]:
    """Yield the findings; only one if the configuration cannot be read."""
    file = config or DEFAULT_CONFIG
    try:
        entries, settings = read_configuration(config, None, None)
    except VerbatimError as error:
        yield fault(
            "configuration", error.message.rstrip("."), "mend the file; docs/reference/models-yaml.md has all keys"
        )
        return
    yield ok("configuration", str(file) if file.exists() else f"no {file}: the demo model is served")
    for entry in entries:
        yield _model(entry)
    yield _port(settings)
    yield _doors(settings, config)
    yield _ledger(settings, config)
    yield from _secrets(settings, file)


def _model(entry: ModelConfig) -> Finding:
    name, row = f"model {entry.id}", listed(entry)
    if not row.there:
        cure = f"mend its path in the configuration, or remove the entry: {row.source}"
        return fault(name, row.note, cure)
    if str(entry.path).endswith(".gguf") and importlib.util.find_spec("gguf") is None:
        cure = "install it with pip: gguf>=0.16.3,<0.20"
        return fault(name, "a GGUF file, and the package gguf is not installed", cure)
    if row.size is not None and row.size > free_memory():
        told = f"{format_bytes(row.size)} of files, and {format_bytes(free_memory())} of memory are free"
        return warn(name, told, "end other programs, or set quantization: int8 for a CPU")
    return ok(name, f"{row.source}{'' if row.size is None else f', {format_bytes(row.size)}'}")


def _port(settings: ServerSettings) -> Finding:
    place = f"{settings.host}:{settings.port}"
    try:
        bind(settings.host, settings.port).close()
    except VerbatimError as error:
        cure = "end the other server, or choose another port: verbatim serve --port N"
        return warn("port", error.message.partition(". Choose")[0].rstrip("."), cure)
    return ok("port", f"{place} is free")


def _doors(settings: ServerSettings, config: Path | None) -> Finding:
    if existing(settings, config) is not None:
        return ok("access", f"{settings.host}; keys are asked for once there is one")
    try:
        refuse_strangers(settings)
    except VerbatimError as error:
        return fault("access", error.message.partition(". ")[0], "verbatim keys create NAME, or --allow-anonymous")
    if settings.allow_anonymous:
        return warn(
            "access", f"{settings.host} without keys: anybody who reaches it can use it", "verbatim keys create NAME"
        )
    return ok("access", f"{settings.host}: only this machine")


def _ledger(settings: ServerSettings, config: Path | None) -> Finding:
    url = existing(settings, config)
    if url is None:
        return ok("ledger", "none: there are no keys")
    from server.ledger.store import Ledger

    try:
        with closing(Ledger(url, time.time)) as ledger:  # noqa: TID251  the ledger records the wall clock
            keys, problems = len(ledger.all_keys()), ledger.check()
    except VerbatimError as error:
        return fault("ledger", error.message.rstrip("."), "docs/guides/troubleshooting.md, ledger_fault")
    if problems:
        return fault("ledger", f"it does not add up: {problems[0]}", "verbatim keys check lists all; keep a copy first")
    return ok("ledger", f"it adds up; {keys} keys")


def _secrets(settings: ServerSettings, file: Path) -> Iterator[Finding]:
    """Look at what the settings of receipts name."""

    def beside(given: Path) -> Path:
        return file.parent / given.expanduser()

    if settings.receipts.sign is not None:
        key = beside(settings.receipts.sign)
        yield _readable("receipts' key", key, private=True)
    if settings.receipts.keep not in (None, "ledger"):
        folder = beside(Path(str(settings.receipts.keep)))
        base = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if os.access(base, os.W_OK):
            yield ok("receipts", str(folder))
        else:
            cure = "let this user write it, or name another under receipts: keep:"
            yield fault("receipts", f"{folder} cannot be written", cure)


def _readable(name: str, file: Path, *, private: bool) -> Finding:
    if not os.access(file, os.R_OK):
        return fault(name, f"{file} is missing, or this user cannot read it", "verbatim receipts keygen makes one")
    if private and stat.S_IMODE(file.stat().st_mode) & 0o077:
        return warn(name, f"{file} can be read by other users", f"chmod 600 {file}")
    return ok(name, str(file))

"""Makes a bundle: in a folder beside its place, which gets its name when it is complete and has been checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine import ConfigError, ModelConfig
from server.bundle.check import check_bundle
from server.bundle.checksums import FILE, digest_of, write_checksums
from server.bundle.models import copy_models
from server.bundle.texts import install_script, readme
from server.bundle.wheels import TorchBuild, collect_wheels, own_version, requirements_of

__all__ = ["BundleJob", "create_bundle", "read_public_key"]

KEY_FILE: Final = "receipts-key.pem"
"""The public key of receipts in a bundle."""

_LARGEST_KEY = 64 * 2**10  # bytes


@dataclass(frozen=True, slots=True)
class BundleJob:
    """What goes into a bundle. `entries`: none for the software alone. `key`: the public key of receipts (PEM)."""

    target: Path
    entries: Sequence[ModelConfig]
    build: TorchBuild
    key: bytes | None = None
    pull: bool = False


def create_bundle(job: BundleJob, say: Callable[[str], None]) -> str:
    """Make a bundle and return the SHA-256 of its checksums.

    Raises:
        ConfigError: its place is taken, or something could not be fetched or written.
        LoadError: a model is missing or damaged.
    """
    target = job.target
    partial = target.with_name(f"{target.name}.partial")
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists already; a bundle gets a folder of its own.")
    try:
        partial.mkdir()
    except FileExistsError:
        raise ConfigError(
            f"{partial} exists: another run is writing there, or one was killed. In the latter case remove it."
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot make {partial}: {error.strerror}.") from None
    try:
        _fill(partial, job, say)
        digest = digest_of(partial / FILE)
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"cannot write {error.filename or partial}: {error.strerror}.") from None
        raise
    return digest


def _fill(root: Path, job: BundleJob, say: Callable[[str], None]) -> None:
    if job.entries:
        say("copying the models")
        copy_models(job.entries, root, pull=job.pull)
    say("fetching the packages of the lock")
    wheels = root / "wheels"
    wheels.mkdir()
    collect_wheels(wheels, job.build)
    (root / "requirements.txt").write_text(requirements_of(wheels), encoding="utf-8")
    if job.key is not None:
        (root / KEY_FILE).write_bytes(job.key)
    models = [entry.id for entry in job.entries]
    key = KEY_FILE if job.key is not None else None
    (root / "README.txt").write_text(readme(own_version(), models, key), encoding="utf-8")
    (root / "install.sh").write_text(install_script(with_models=bool(models)), encoding="utf-8")
    (root / "install.sh").chmod(0o755)
    say("computing the checksums")
    try:
        write_checksums(root)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    say("checking")
    fault = next(check_bundle(root), None)
    if fault is not None:
        raise ConfigError(f"the bundle was not written as it should be: {fault}")


def read_public_key(path: Path) -> bytes:
    """Read a file with a public key (PEM).

    Raises:
        ConfigError: it cannot be read, or is no public key; a private one must not leave its machine.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_KEY + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
    if b"PRIVATE KEY" in content or b'"private"' in content:
        raise ConfigError(f"{path} is a private key, which must not leave its machine; give the public one.")
    if len(content) > _LARGEST_KEY or b"PUBLIC KEY" not in content:
        raise ConfigError(f"{path} is not a public key in PEM format.")
    return content

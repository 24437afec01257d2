"""Collects the wheels of a bundle: what the lock names for this platform and Python, and this project's own.

pip downloads and compares hashes; this decides what to ask it for.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

from engine import ConfigError
from server.bundle.checksums import digest_of

__all__ = ["DISTRIBUTION", "TorchBuild", "collect_wheels", "installed_build", "own_version", "requirements_of"]

TorchBuild = Literal["cpu", "cu130"]

DISTRIBUTION: Final = "verbatim-server"
_SOURCES: Final = ("engine", "server", "demo/model", "requirements")
_BUILD_FILES: Final = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
_OF_THE_INSTALLATION: Final = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})
"""Files of a `.dist-info` folder that the installer wrote."""
_PACKAGE: Final = Path(__file__).resolve().parents[1]
_LOCKED: Final = ("--require-hashes", "--no-deps", "--only-binary", ":all:")


def checkout() -> Path | None:
    """Return the root of the checkout that runs; None if this is an installed copy."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "requirements" / "runtime.txt").is_file() else None


def lock_folder() -> Path:
    """Return the folder of the lock: `requirements/` of a checkout, a copy of it in an installed package.

    Raises:
        ConfigError: this copy came without it.
    """
    root = checkout()
    folder = root / "requirements" if root else _PACKAGE / "bundle" / "lock"
    if not (folder / "runtime.txt").is_file():
        raise ConfigError(f"this copy of verbatim came without the lock: {folder / 'runtime.txt'} does not exist.")
    return folder


def installed_build() -> TorchBuild:
    """Return which of the lock's builds of torch is installed."""
    version = metadata.version("torch")
    return "cpu" if version.endswith("+cpu") or sys.platform != "linux" else "cu130"


def own_version() -> str:
    """Return this project's version."""
    return metadata.version(DISTRIBUTION)


def collect_wheels(target: Path, build: TorchBuild) -> None:
    """Put the wheels of the lock and this project's own into a folder.

    Raises:
        ConfigError: a wheel could not be fetched or made; with pip's own words.
    """
    lock = lock_folder()
    torch = ("download", "--dest", str(target), *_LOCKED, "-r", str(lock / f"torch-{build}.txt"))
    # Where pip finds torch in a folder (PIP_FIND_LINKS), no index is asked.
    if _pip(*torch, "--no-index") is not None and (fault := _pip(*torch)) is not None:
        raise ConfigError(f"torch could not be fetched: {fault}")
    fault = _pip("download", "--dest", str(target), *_LOCKED, "-r", str(lock / "runtime.txt"))
    if fault is not None:
        raise ConfigError(f"the packages of the lock could not be fetched: {fault}")
    root = checkout()
    if root is not None:
        _build(root, target)
    else:
        _repack(target)


def requirements_of(wheels: Path) -> str:
    """Pin every wheel of a folder to its release and its hash."""
    lines = []
    for wheel in sorted(wheels.iterdir()):
        name, version, *_ = wheel.name.split("-")
        lines.append(f"{name}=={version} --hash=sha256:{digest_of(wheel)}\n")
    return "".join(lines)


def _pip(*arguments: str) -> str | None:
    """Run pip in this environment. Returns None, or the last thing it said before it failed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    if "No module named pip" in done.stderr:
        return f"{sys.executable} has no pip; install it there, or make the bundle from an environment that has it."
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return (errors or done.stderr.split("\n")[-1:] or ["pip failed."])[-1].removeprefix("ERROR: ")[:600]


def _build(root: Path, target: Path) -> None:
    """Build this project's wheel from a copy of the checkout, so that nothing is left in it."""
    with tempfile.TemporaryDirectory(prefix="verbatim-bundle-") as scratch:
        copy = Path(scratch) / "source"
        for name in _SOURCES:
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in _BUILD_FILES:
            shutil.copy2(root / name, copy / name)
        fault = _pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(target), str(copy))
    if fault is not None:
        raise ConfigError(f"verbatim's own wheel could not be built from {root}: {fault}")


def _repack(target: Path) -> None:
    """Write this project's wheel from the files of its installation."""
    installed = metadata.distribution(DISTRIBUTION)
    files = sorted(
        (path.as_posix(), Path(str(installed.locate_file(path))))
        for path in installed.files or ()
        if ".." not in path.parts and "__pycache__" not in path.parts and not _of_the_installation(path.as_posix())
    )
    info = f"{DISTRIBUTION.replace('-', '_')}-{installed.version}.dist-info"
    if f"{info}/WHEEL" not in {name for name, _ in files} or not any(name == "server/cli.py" for name, _ in files):
        raise ConfigError(
            "verbatim's own wheel cannot be made from this installation: its files are not recorded. Install it from a "
            "wheel, or make the bundle in a checkout."
        )
    record = []
    with zipfile.ZipFile(
        target / f"{info.removesuffix('.dist-info')}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
    ) as wheel:
        for name, path in files:
            content = path.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(content)}\n")
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]))


def _of_the_installation(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder.endswith(".dist-info") and file in _OF_THE_INSTALLATION

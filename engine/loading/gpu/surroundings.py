"""Look for what Triton needs on this machine before a kernel is compiled. Compiles nothing; imports no torch or triton.

Triton builds its launcher, a small C program against Python.h and the driver's library, on the machine where kernels
run. What is missing there is the commonest failure on workstations, and its own message does not say what to install.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from engine.cache_folder import cache_folder, make_private

__all__ = ["SURROUNDINGS", "Missing", "package", "triton_folder"]

_OS_RELEASE: Final = Path("/etc/os-release")
_SECONDS: Final = 20.0  # for ldconfig

_MANAGERS: Final = {
    "apt": ("debian", "ubuntu"),
    "dnf": ("fedora", "rhel", "centos"),
    "pacman": ("arch",),
    "zypper": ("suse", "opensuse"),
    "apk": ("alpine",),
}
_PACKAGES: Final = {
    "apt": {"compiler": "gcc libc6-dev", "headers": "python{major}.{minor}-dev"},
    "dnf": {"compiler": "gcc", "headers": "python3-devel"},
    "pacman": {"compiler": "gcc", "headers": "python"},
    "zypper": {"compiler": "gcc", "headers": "python{major}{minor}-devel"},
    "apk": {"compiler": "gcc musl-dev", "headers": "python3-dev"},
}
_INSTALL: Final = {"apt": "install", "dnf": "install", "pacman": "-S", "zypper": "install", "apk": "add"}


class Missing(Exception):
    """Something is not there; the message is one sentence that says what to do."""


def package(kind: str, os_release: str | None = None) -> str:
    """Return the command that installs a `compiler` or Python's `headers` on this system; empty if it is unknown.

    Args:
        os_release: the text of /etc/os-release; read if it is not given.
    """
    if os_release is None:
        try:
            os_release = _OS_RELEASE.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    said = dict(re.findall(r'^(ID|ID_LIKE)="?([^"\n]*)"?$', os_release, re.MULTILINE))
    names = [*said.get("ID", "").split(), *said.get("ID_LIKE", "").split()]
    for name in names:
        for manager, known in _MANAGERS.items():
            if any(name == one or name.startswith(f"{one}-") for one in known):
                major, minor = sys.version_info[:2]
                wanted = _PACKAGES[manager][kind].format(major=major, minor=minor)
                return f"{manager} {_INSTALL[manager]} {wanted}"
    return ""


def compiler() -> str:
    """Return the C compiler that Triton will take: `$CC`, gcc or clang, in this order."""
    given = os.environ.get("CC")
    found = shutil.which(given) if given else shutil.which("gcc") or shutil.which("clang")
    if found:
        return found
    if given:
        raise Missing(f"CC={given} does not exist; unset CC or let it name a C compiler.")
    other = shutil.which("cc")
    if other:
        raise Missing(f"Triton looks for gcc or clang and finds neither; set CC={other}.")
    raise Missing(f"There is no C compiler, with which Triton builds its launcher; {_advice('compiler', 'gcc')}.")


def header() -> str:
    """Return the folder of Python.h."""
    scheme = sysconfig.get_default_scheme()
    # As in triton.runtime.build: on Debian, the system's Python has its headers under the other prefix.
    folder = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if Path(folder, "Python.h").is_file():
        return folder
    if not folder.startswith("/usr/include"):
        raise Missing(
            f"Python.h is not in {folder}: this Python came without its headers; install it again with them, or make "
            f"the environment with another Python."
        )
    raise Missing(f"Python.h is not in {folder}; {_advice('headers', 'the headers of Python')}.")


def driver_library() -> str:
    """Return where the driver's libcuda.so.1 is, which the launcher is linked with."""
    given = os.environ.get("TRITON_LIBCUDA_PATH")
    folders = [given] if given else [*_linked(), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    for folder in folders:
        if folder and Path(folder, "libcuda.so.1").exists():
            return str(Path(folder, "libcuda.so.1"))
    raise Missing(
        "libcuda.so.1 is in no folder of the linker; run /sbin/ldconfig as root, or in a container give it the driver "
        "(docker run --gpus all)."
    )


def _linked() -> list[str]:
    try:
        done = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in done.stdout.splitlines() if "libcuda.so.1" in line]
    return [os.path.dirname(line.split()[-1]) for line in lines]


def triton_folder() -> Path | None:
    """Return where Triton keeps compiled kernels: `$TRITON_CACHE_DIR`, else a part of our cache folder."""
    given, ours = os.environ.get("TRITON_CACHE_DIR"), cache_folder()
    return Path(given) if given else ours / "triton" if ours else None


def writable_folder() -> str:
    """Make the folder for compiled kernels, write a file there, and return the folder."""
    folder = triton_folder()
    if folder is None:
        raise Missing("This user has no home; set XDG_CACHE_HOME to a folder for compiled kernels.")
    try:
        make_private(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
            file.flush()
    except OSError as error:
        raise Missing(
            f"{folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can, for compiled "
            f"kernels."
        ) from error
    return str(folder)


def _advice(kind: str, words: str) -> str:
    command = package(kind)
    return f"run, as root: {command}" if command else f"install {words} with the system's package manager"


SURROUNDINGS: Final[tuple[tuple[str, Callable[[], str]], ...]] = (
    ("C compiler", compiler),
    ("Python.h", header),
    ("libcuda", driver_library),
    ("cache folder", writable_folder),
)
"""The checks, in order. Each returns what it found, or raises `Missing`."""

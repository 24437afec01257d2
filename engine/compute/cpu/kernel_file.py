"""Compile the kernels with the machine's C compiler, try the file, keep it, and check it before it is loaded again.

A shared library has all rights of this process from the moment it is loaded, and a damaged one ends the process with a
signal. So a file is loaded only if it is whole (it ends with a checksum of itself, written after a child process had
called every function) and nobody else can have written it. Otherwise the kernels are compiled anew.
Knows compilers and files; nothing of torch, tensors or what the kernels compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from engine.cache_folder import cache_folder, private_folder, written_by_others
from engine.compute.cpu.kernel_trial import REFUSED
from engine.compute.processor import ARM, processor_target

__all__ = ["FLAGS", "Distrusted", "NoKernels", "Trial", "keep_sealed", "load", "read_sealed", "run_trial"]

_T = TypeVar("_T")
_Use = Callable[[ctypes.CDLL, Path], _T]

FLAGS: Final = ("-ffp-contract=off", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC", "-pthread")
"""For every processor. Contraction off: where a product is fused with a sum is written down, not left to the compiler.
No `errno` of a root: then it is an instruction, and no other library is needed."""

_TIMEOUT: Final = 120.0  # seconds for the compiler
_TRIAL_SECONDS: Final = 60.0  # it takes a quarter of one
_LARGEST: Final = 64 << 20  # bytes; the file has a tenth of one MiB
_NOEXEC: Final = getattr(os, "ST_NOEXEC", 0)  # 0 where the system does not tell
_MARK: Final = b"\nverbatim "
_SEAL: Final = len(_MARK) + 64  # bytes: the mark, then the SHA-256 of all before it


class NoKernels(Exception):
    """No compiled kernels can be had here; the message says why and what would help."""


class Distrusted(Exception):
    """A file or folder is not whole, or somebody else may have written it."""


class Trial(NamedTuple):
    """How a trial in a child process ended: `fault` is what went wrong, None if nothing did."""

    fault: str | None
    lasting: bool = True
    """Whether it would end so again: it says something about the machine, not about what else happens there now."""


def load(
    source: Path,
    cache: Path | None,
    flags: Sequence[str],
    progress: Callable[[str], None] | None,
    use: _Use[_T],
) -> _T:
    """Load the library from the kept file, or compile it (some twenty seconds).

    Args:
        source: a file of C; the headers beside it belong to it.
        cache: the folder for compiled files; default `$XDG_CACHE_HOME/verbatim` or `~/.cache/verbatim`.
        progress: told when it has to be compiled, and why again.
        use: makes the result of the library and its file, which may be gone afterwards. Raises nothing.

    Raises:
        NoKernels: no compiler, one that fails, or one whose work fails when it is tried.
    """
    say = progress or (lambda text: None)
    compiler = _find_compiler()
    version = _version(compiler)
    # clang takes 39 seconds for -O3, six for -O2, and gains nothing by it; gcc vectorises less at -O2.
    flags = ("-O2" if "clang" in version else "-O3", _native(version), *FLAGS, *flags)
    # What is native depends on the processor, and several machines may share a home.
    texts = (version, " ".join(flags), processor_target())
    sources = (source, *sorted(source.parent.glob("*.h")))
    parts = (*(file.read_bytes() for file in sources), *(text.encode() for text in texts))
    name = f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    folder, why = _folder(cache or cache_folder())
    if folder is not None and os.path.lexists(folder / name):
        try:
            return _open(folder / name, use)
        except Distrusted as error:
            why = f"the kept file {error}"
    say(f"compiling kernels for this processor{f': {why}' if why else ''}")
    return _compiled([compiler, *flags, str(source)], folder, name, say, use)


def _compiled(command: Sequence[str], folder: Path | None, name: str, say: Callable[[str], None], use: _Use[_T]) -> _T:
    """Compile, try, keep and load; on failure once more elsewhere, for the disk may be full."""
    fault: NoKernels | None = None
    for base in (folder, None):
        try:
            with tempfile.TemporaryDirectory(prefix=".kernels-", dir=base) as work:
                made = _compile(command, Path(work) / name)
                if folder is not None:
                    try:
                        kept = _keep(made.read_bytes(), folder / name)
                    except OSError as error:
                        say(f"the kernels are compiled for this process alone: {folder}: {error.strerror}")
                    else:
                        return _open(kept, use)
                return _open(made, use)
        except NoKernels as error:
            fault = error
        except Distrusted as error:
            fault = NoKernels(f"the compiled file {error}")
        except OSError as error:  # a full disk
            fault = NoKernels(f"they cannot be written: {error}")
    assert fault is not None
    raise fault


def _compile(command: Sequence[str], target: Path) -> Path:
    """Compile the source, try the result, and append its checksum."""
    try:
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{command[0]} cannot compile them: {error}") from error
    if done.returncode:
        first = (done.stderr.strip().splitlines() or ["?"])[0]
        raise NoKernels(f"{command[0]} cannot compile them: {first}")
    content = target.read_bytes()
    if fault := run_trial(target, "main", _TRIAL_SECONDS).fault:
        raise NoKernels(f"{command[0]} compiles them, but they fail when they are tried: {fault}")
    _write(target, _sealed(content))
    return target


def run_trial(library: Path, name: str, seconds: float) -> Trial:
    """Call a function of `engine.compute.cpu.kernel_trial` with a compiled file, in a child process that may crash."""
    trial = f"from engine.compute.cpu.kernel_trial import {name}; {name}(*sys.argv[2:])"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); {trial}"
    root = Path(__file__).resolve().parents[3]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, str(root), str(library)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Trial(f"no end after {seconds:g} seconds")
    except OSError as error:
        return Trial(str(error), lasting=False)
    if done.returncode < 0:
        ended = signal.Signals(-done.returncode)
        return Trial(f"ended by {ended.name}", lasting=ended != signal.SIGKILL)  # which comes from outside
    if not done.returncode:
        return Trial(None)
    return Trial((done.stderr.strip().splitlines() or ["?"])[-1], lasting=done.returncode != REFUSED)


def keep_sealed(content: bytes, target: Path) -> None:
    """Keep some text as a compiled file is kept: whole or not at all, for this user. Raises OSError."""
    _keep(_sealed(content), target)


def read_sealed(path: Path) -> bytes:
    """Read what `keep_sealed` has kept. Raises Distrusted: it is not whole, or somebody else may have written it."""
    return _check(path)


def _sealed(content: bytes) -> bytes:
    return content + _MARK + hashlib.sha256(content).hexdigest().encode()


def _keep(content: bytes, target: Path) -> Path:
    """Write a file beside its target, flush it to the disk, then rename it: no reader ever sees a part of it."""
    handle, name = tempfile.mkstemp(prefix=".kernels-", dir=target.parent)
    os.close(handle)
    partial = Path(name)
    try:
        _write(partial, content)
        partial.replace(target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        os.chmod(file.fileno(), 0o600)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _open(path: Path, use: _Use[_T]) -> _T:
    """Load a file that `_compile` has sealed.

    Raises:
        Distrusted: it has no valid seal, or does not load.
    """
    _check(path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Distrusted(f"does not load: {error}") from error
    return use(library, path)


def _check(path: Path) -> bytes:
    """Return what a sealed file holds. Raises Distrusted: it is not whole, or somebody else may have written it."""
    try:
        # A link is not followed, and a pipe not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                raise Distrusted("is no file of ours")
            if fault := written_by_others(status):
                raise Distrusted(fault)
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Distrusted("is a link" if path.is_symlink() else f"cannot be read: {error.strerror}") from error
    body, seal = content[:-_SEAL], content[-_SEAL:]
    if body + seal != _sealed(body):
        raise Distrusted("is not whole: its checksum is another, or missing")
    return body


def _folder(folder: Path | None) -> tuple[Path | None, str]:
    """Make the folder if it is missing, and return it; None, and why, if others could write there, nobody can, or it
    is of no use.
    """
    if folder is None:
        return None, "there is no home to keep them in"
    real, why = private_folder(folder)
    try:
        if real is not None and os.statvfs(real).f_flag & _NOEXEC:
            return None, f"{folder} is mounted with noexec, so nothing in it can be loaded"
    except OSError as error:
        return None, f"{folder}: {error.strerror}"
    return real, why


def _find_compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoKernels("no C compiler was found; install one (gcc or clang) for about three times the speed")


def _native(version: str) -> str:
    """Return the flag for all instructions of this processor; clang has another one for ARM."""
    return "-mcpu=native" if "clang" in version and platform.machine() in ARM else "-march=native"


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{compiler} does not run: {error}") from error

"""The kernels' compiled file: kept, checked and tried.

Whatever lies in its place, a start ends neither in a signal nor with somebody else's code in this process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.compute.cpu import kernel_file
from engine.compute.cpu.kernels import Kernels, NoKernels

_QUICK = ("-O0",)
"""Flags for tests that compile: a second instead of five."""
NOBODY = 65534


@pytest.fixture(scope="module")
def good(kernels: Kernels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled file as the compiler made it, without its seal."""
    cache = tmp_path_factory.mktemp("good")
    Kernels.load(cache, _QUICK)
    (built,) = cache.iterdir()
    built.write_bytes(built.read_bytes()[: -kernel_file._SEAL])
    return built


class Compiler:
    """A compiler of our own: a shell script that notes each call and makes what it is told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._calls = folder / "calls"
        self._script = folder / "own-cc"
        monkeypatch.setenv("CC", str(self._script))

    def does(self, script: str) -> None:
        """`$out` is the file to make, `$call` the number of the call, from 1."""
        head = f"""\
            #!/bin/sh
            if [ "$1" = --version ]; then echo own 1; exit; fi
            echo x >> {self._calls}
            call=$(wc -l < {self._calls})
            for out; do :; done
            """
        self._script.write_text(textwrap.dedent(head) + textwrap.dedent(script) + "\n")
        self._script.chmod(0o755)

    @property
    def calls(self) -> int:
        return len(self._calls.read_text().split()) if self._calls.exists() else 0


@pytest.fixture
def compiler(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """One that makes the good file, at once."""
    compiler = Compiler(tmp_path, monkeypatch)
    compiler.does(f'cp {good} "$out"')
    return compiler


def _sealed(content: bytes) -> bytes:
    return content + kernel_file._MARK + hashlib.sha256(content).hexdigest().encode()


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_they_are_compiled_once_and_kept_for_this_user_alone(
    compiler: Compiler, kernels: Kernels, tmp_path: Path
) -> None:
    cache, told = tmp_path / "cache", list[str]()
    Kernels.load(cache, progress=told.append)
    assert told == ["compiling kernels for this processor"]
    (built,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(built.stat().st_mode) == 0o600
    assert Kernels.load(cache, progress=told.append).target == kernels.target
    assert list(cache.iterdir()) == [built]
    assert (len(told), compiler.calls) == (1, 1)


def _cut(length: int) -> Callable[[Path, Path], object]:
    return lambda file, good: os.truncate(file, length if length >= 0 else file.stat().st_size + length)


def _flip(place: int) -> Callable[[Path, Path], object]:
    def flip(file: Path, good: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)

    return flip


def _other_architecture(file: Path, good: Path) -> None:
    content = bytearray(good.read_bytes())
    content[18] = 0xB7  # aarch64
    file.write_bytes(_sealed(bytes(content)))


def _elsewhere(file: Path, good: Path) -> None:
    file.rename(file.parent.parent / "elsewhere.so")
    file.symlink_to(file.parent.parent / "elsewhere.so")


def _foreign(file: Path, good: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(file, NOBODY, NOBODY)


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "cut to nothing": (_cut(0), "not whole"),
    "cut after the header": (_cut(4096), "not whole"),
    "cut by a byte": (_cut(-1), "not whole"),
    "cut before its seal": (_cut(-kernel_file._SEAL), "not whole"),
    "zeros of the right length": (lambda file, good: file.write_bytes(bytes(file.stat().st_size)), "not whole"),
    "zeros at the end": (lambda file, good: file.write_bytes(file.read_bytes()[:5000] + bytes(90000)), "not whole"),
    "a bit of its header": (_flip(5), "not whole"),
    "a bit of its code": (_flip(30_000), "not whole"),
    "a bit of its seal": (_flip(-3), "not whole"),
    "as compiled, never tried": (lambda file, good: shutil.copy(good, file), "not whole"),
    "no library": (lambda file, good: file.write_text("not a library"), "not whole"),
    "no library, sealed": (lambda file, good: file.write_bytes(_sealed(b"not a library")), "does not load"),
    "of another architecture, sealed": (_other_architecture, "does not load"),
    "a link to a good one": (_elsewhere, "is a link"),
    "a pipe": (lambda file, good: (file.unlink(), os.mkfifo(file, 0o600)), "is no file of ours"),
    "a giant": (_cut(1 << 40), "is no file of ours"),
    "another user's": (_foreign, "belongs to another user"),
    "open to the group": (lambda file, good: file.chmod(0o620), "can be written by other users"),
    "open to all": (lambda file, good: file.chmod(0o602), "can be written by other users"),
}


@pytest.mark.parametrize(("damage", "why"), DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_not_ours_and_whole_is_compiled_anew(
    compiler: Compiler, good: Path, tmp_path: Path, damage: Callable[[Path, Path], object], why: str
) -> None:
    """And the next start finds a good one."""
    cache, told = tmp_path / "cache", list[str]()
    Kernels.load(tmp_path / "loaded")
    shutil.copytree(tmp_path / "loaded", cache)  # what this process has in its memory stays as it is
    (file,) = cache.iterdir()
    damage(file, good)
    Kernels.load(cache, progress=told.append)
    [line] = told
    assert line.startswith("compiling kernels for this processor: the kept file ")
    assert why in line
    assert compiler.calls == 2
    assert file.read_bytes() == _sealed(good.read_bytes())
    assert list(cache.iterdir()) == [file]
    Kernels.load(cache, progress=told.append)
    assert (len(told), compiler.calls) == (1, 2)


def test_a_folder_in_its_place_leaves_this_process_its_kernels(
    compiler: Compiler, kernels: Kernels, tmp_path: Path
) -> None:
    cache, told = tmp_path / "cache", list[str]()
    Kernels.load(cache)
    (file,) = cache.iterdir()
    file.unlink()
    file.mkdir()
    assert Kernels.load(cache, progress=told.append).target == kernels.target
    assert "for this process alone" in told[-1]
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize("changed", ["kernels.c", "team.h"])
def test_another_source_is_compiled_anew(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Also where only a header has changed."""
    shutil.copytree(Path(kernel_file.__file__).with_name("native"), tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("engine.compute.cpu.kernels._SOURCE", tmp_path / "kernels.c")
    for calls in (1, 1):
        Kernels.load(tmp_path / "cache")
        assert compiler.calls == calls
    with (tmp_path / changed).open("a") as file:
        file.write("/* another */\n")
    Kernels.load(tmp_path / "cache")
    assert compiler.calls == 2


def test_many_starts_at_once_each_get_whole_kernels(compiler: Compiler, good: Path, tmp_path: Path) -> None:
    compiler.does(f'head -c 5000 {good} > "$out"; sleep 0.2; cp {good} "$out"')
    cache, found = tmp_path / "cache", list[str]()
    starts = [threading.Thread(target=lambda: found.append(Kernels.load(cache).target)) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(found) == 4
    (file,) = cache.iterdir()
    assert file.read_bytes() == _sealed(good.read_bytes())


# -- where it is kept --------------------------------------------------------------------------------------------------


def _open_parent(cache: Path) -> Path:
    cache.mkdir(parents=True, mode=0o700)
    cache.parent.chmod(0o777)
    return cache


def _foreign_folder(cache: Path) -> Path:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    cache.mkdir(parents=True, mode=0o700)
    os.chown(cache, NOBODY, NOBODY)
    return cache


def _open_folder(mode: int) -> Callable[[Path], Path]:
    def make(cache: Path) -> Path:
        cache.mkdir(parents=True)
        cache.chmod(mode)
        return cache

    return make


def _link_to(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def link(cache: Path) -> Path:
        make(cache.parent.parent / "target" / "of")
        cache.parent.mkdir(parents=True)
        cache.symlink_to(cache.parent.parent / "target" / "of")
        return cache

    return link


def _file_in_the_way(cache: Path) -> Path:
    cache.parent.mkdir(parents=True)
    cache.write_text("")
    return cache


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "open to all": (_open_folder(0o777), "can be written by other users"),
    "open to the group": (_open_folder(0o770), "can be written by other users"),
    "another user's": (_foreign_folder, "belongs to another user"),
    "in a folder that is open to all": (_open_parent, "which anybody can write"),
    "a link to one that is open": (_link_to(_open_folder(0o777)), "can be written by other users"),
    "a file in the way": (_file_in_the_way, "File exists"),
}


@pytest.mark.parametrize(("make", "why"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_others_can_write_is_not_used(
    compiler: Compiler, kernels: Kernels, tmp_path: Path, make: Callable[[Path], Path], why: str
) -> None:
    """Whoever can write there could have any code run. Then they are compiled for this process alone."""
    cache, told = make(tmp_path / "parent" / "cache"), list[str]()
    assert Kernels.load(cache, progress=told.append).target == kernels.target
    [line] = told
    assert line.startswith("compiling kernels for this processor: ")
    assert why in line
    assert not cache.is_dir() or not list(cache.iterdir())


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="this system does not tell how a file system is mounted")
def test_a_folder_that_runs_nothing_leaves_this_process_its_kernels(
    compiler: Compiler, kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container's `--tmpfs` is mounted: a file that is kept there could not be loaded."""
    cache, told = tmp_path / "cache", list[str]()
    mounted = os.statvfs(tmp_path)

    def statvfs(path: Path) -> object:
        noexec = os.ST_NOEXEC if path == cache else 0
        return SimpleNamespace(f_flag=mounted.f_flag & ~os.ST_NOEXEC | noexec)

    monkeypatch.setattr(kernel_file.os, "statvfs", statvfs)
    assert Kernels.load(cache, progress=told.append).target == kernels.target
    [line] = told
    assert f"{cache} is mounted with noexec" in line
    assert not list(cache.iterdir())


def test_a_link_of_mine_to_a_folder_of_mine_is_followed(compiler: Compiler, tmp_path: Path) -> None:
    """A home is small, another disk is large."""
    cache = _link_to(_open_folder(0o700))(tmp_path / "parent" / "cache")
    Kernels.load(cache)
    Kernels.load(cache)
    assert compiler.calls == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_folder_that_takes_nothing_leaves_this_process_its_kernels(
    compiler: Compiler, kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A full disk, a read-only one: they are compiled elsewhere, and it is said."""
    cache, told, real = tmp_path / "cache", list[str](), kernel_file.tempfile.mkdtemp

    def mkdtemp(suffix: str | None = None, prefix: str | None = None, dir: str | None = None) -> str:
        if dir is not None:
            raise OSError(number, os.strerror(number))
        return real(suffix, prefix, str(tmp_path))

    def mkstemp(**given: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(kernel_file.tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(kernel_file.tempfile, "mkstemp", mkstemp)
    assert Kernels.load(cache, progress=told.append).target == kernels.target
    assert told[1:] == [f"the kernels are compiled for this process alone: {cache}: {os.strerror(number)}"]
    assert list(cache.iterdir()) == []


def test_a_disk_that_is_full_while_they_are_compiled_leaves_this_process_its_kernels(
    compiler: Compiler, good: Path, kernels: Kernels, tmp_path: Path
) -> None:
    compiler.does(
        f'case "$out" in *cache*) head -c 5000 {good} > "$out"; echo "No space left" >&2; exit 1;; esac\n'
        f'cp {good} "$out"'
    )
    assert Kernels.load(tmp_path / "cache").target == kernels.target
    assert compiler.calls == 2


@pytest.mark.parametrize("folder", ["the cache", "no cache"])
def test_disks_that_are_all_full_are_told(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    """Then torch's own kernels are used: nobody is left without a server."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kernel_file.tempfile, "mkstemp", full)
    monkeypatch.setattr(kernel_file.tempfile, "mkdtemp", full)
    if folder == "no cache":
        (tmp_path / "cache").write_text("")
    with pytest.raises(NoKernels, match=r"cannot be written: .*No space left on device"):
        Kernels.load(tmp_path / "cache")


def test_a_folder_that_cannot_be_written_but_holds_a_good_file_is_used(
    compiler: Compiler, good: Path, tmp_path: Path
) -> None:
    """As in an image that is made once and run read-only. What root has put there is as good as one's own."""
    cache = tmp_path / "cache"
    Kernels.load(cache)
    cache.chmod(0o500)
    Kernels.load(cache)
    assert compiler.calls == 1


def test_without_a_home_they_are_compiled_for_this_process(
    compiler: Compiler, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(kernel_file.Path, "home", staticmethod(nobody))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kernel_file.tempfile, "tempdir", str(temporary))
    assert Kernels.load().target == kernels.target
    assert list(temporary.iterdir()) == []


def test_the_default_cache_is_the_users(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Kernels.load()
    assert [p.name.split("-")[0] for p in (tmp_path / "verbatim").iterdir()] == ["kernels"]


def test_folders_that_are_made_are_trusted_at_the_next_start_whatever_the_umask(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    before = os.umask(0)
    try:
        Kernels.load()
        Kernels.load()
    finally:
        os.umask(before)
    assert compiler.calls == 1


# -- the compiler and its work -----------------------------------------------------------------------------------------


def test_without_a_compiler_the_reason_and_the_way_out_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NoKernels, match="no C compiler was found; install one"):
        Kernels.load()


def test_a_compiler_that_fails_is_named_and_leaves_nothing(compiler: Compiler, tmp_path: Path) -> None:
    compiler.does("echo 'no such thing as -march=native' >&2; exit 1")
    with pytest.raises(NoKernels, match="own-cc cannot compile them: no such thing"):
        Kernels.load(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


_SYMBOLS = (
    "linear",
    "pack",
    "pack_groups",
    "round",
    "widen",
    "packed_bytes",
    "scratch",
    "attention",
    "norm",
    "activate",
    "layer_scratch",
    "layers",
    "experts_scratch",
    "experts",
    "matrix_unit",
    "lanes",
    "target",
)
_STUBS = "".join(f"long verbatim_{name}() {{ return 0; }}\n" for name in _SYMBOLS)
_CONSTRUCTOR = "__attribute__((constructor)) void f() { raise(SIGSEGV); }\n" + _STUBS
BROKEN: dict[str, tuple[str, str]] = {
    "ends the process when it is loaded": (_CONSTRUCTOR, "ended by SIGSEGV"),
    "ends the process when it is called": (
        _STUBS.replace("pack() {", "pack() { *(volatile int *)8 = 1;"),
        "ended by SIGSEGV",
    ),
    "knows other instructions": (_STUBS.replace("linear() {", "linear() { __builtin_trap();"), "ended by SIGILL"),
    "reaches behind its file": (_STUBS.replace("pack() {", "pack() { raise(SIGBUS);"), "ended by SIGBUS"),
    "computes nothing": (_STUBS, "a product of kind 0 is 0, not 65"),
    "has no functions": ("int nothing;", "undefined symbol: verbatim_linear"),
    "leaves the process": (_STUBS.replace("pack() {", "pack() { exit(3);"), "?"),
    "never ends": (_STUBS.replace("pack() {", 'pack() { for (;;) __asm__ volatile("");'), "no end after"),
}


@pytest.mark.parametrize(("source", "words"), BROKEN.values(), ids=BROKEN)
def test_what_fails_is_compiled_once_more_and_then_left_out(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    """In a child process: this one goes on, with torch's own kernels, and says why in one line."""
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    (tmp_path / "broken.c").write_text("#include <signal.h>\n#include <stdlib.h>\n" + source)
    broken = tmp_path / "broken.so"
    make = [str(real), "-w", "-std=gnu11", "-shared", "-fPIC", str(tmp_path / "broken.c"), "-o", str(broken)]
    subprocess.run(make, check=True, timeout=60)
    monkeypatch.setattr(kernel_file, "_TRIAL_SECONDS", 2.0 if "no end" in words else 60.0)
    compiler = Compiler(tmp_path, monkeypatch)
    compiler.does(f'cp {broken} "$out"')
    with pytest.raises(NoKernels, match="own-cc compiles them, but they fail when they are tried: ") as caught:
        Kernels.load(tmp_path / "cache")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert compiler.calls == 2
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_fails_once_is_compiled_again_and_kept(
    compiler: Compiler, good: Path, kernels: Kernels, tmp_path: Path
) -> None:
    compiler.does(f'if [ $call = 1 ]; then head -c 50000 {good} > "$out"; else cp {good} "$out"; fi')
    cache = tmp_path / "cache"
    assert Kernels.load(cache).target == kernels.target
    assert compiler.calls == 2
    Kernels.load(cache)
    assert compiler.calls == 2


def test_the_trial_loads_no_torch() -> None:
    """It stands between every first start and its model."""
    code = (
        "import sys, engine.compute.cpu.kernel_trial; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

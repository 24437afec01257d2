"""What Triton needs on a machine: found or named, with the command that installs it. Nothing is compiled here."""

from __future__ import annotations

import stat
import sys
import sysconfig
from pathlib import Path

import pytest

from engine.loading.gpu import surroundings
from engine.loading.gpu.surroundings import Missing, compiler, driver_library, header, package, writable_folder

MINOR = sys.version_info[1]


@pytest.mark.parametrize(
    ("os_release", "compiler", "headers"),
    [
        ('ID=debian\nVERSION="12"', "apt install gcc libc6-dev", f"apt install python3.{MINOR}-dev"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"', "apt install gcc libc6-dev", f"apt install python3.{MINOR}-dev"),
        ("ID=fedora", "dnf install gcc", "dnf install python3-devel"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', "dnf install gcc", "dnf install python3-devel"),
        ("ID=arch", "pacman -S gcc", "pacman -S python"),
        ("ID=cachyos\nID_LIKE=arch", "pacman -S gcc", "pacman -S python"),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"', "zypper install gcc", f"zypper install python3{MINOR}-devel"),
        ("ID=alpine", "apk add gcc musl-dev", "apk add python3-dev"),
        ("ID=nixos", "", ""),
        ("", "", ""),
    ],
)
def test_the_package_is_named_for_each_system(os_release: str, compiler: str, headers: str) -> None:
    assert package("compiler", os_release) == compiler
    assert package("headers", os_release) == headers


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is searched for programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    return folder


def _program(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("there", "cc", "found"),
    [
        (("gcc", "clang", "cc"), None, "gcc"),
        (("clang",), None, "clang"),
        (("gcc", "mycc"), "mycc", "mycc"),
    ],
)
def test_the_compiler_is_the_one_that_triton_takes(
    programs: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], cc: str | None, found: str
) -> None:
    for name in there:
        _program(programs, name)
    if cc:
        monkeypatch.setenv("CC", cc)
    assert Path(compiler()).name == found


@pytest.mark.parametrize(
    ("there", "cc", "words"),
    [
        ((), None, "run, as root: apt install gcc"),
        (("cc",), None, "set CC="),  # Triton does not look for that name
        (("gcc",), "nothere", "CC=nothere does not exist; unset CC"),
    ],
)
def test_a_missing_compiler_is_named(
    programs: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], cc: str | None, words: str
) -> None:
    for name in there:
        _program(programs, name)
    if cc:
        monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(surroundings, "_OS_RELEASE", _release(programs, "ID=debian"))
    with pytest.raises(Missing, match=words):
        compiler()


def test_on_an_unknown_system_no_command_is_made_up(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_OS_RELEASE", programs / "none")
    with pytest.raises(Missing, match="install gcc with the system's package manager"):
        compiler()


def _release(folder: Path, text: str) -> Path:
    path = folder / "os-release"
    path.write_text(text)
    return path


def test_the_header_is_looked_for_where_triton_includes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    assert header() == str(tmp_path)


def test_debians_own_python_has_its_header_under_the_other_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"posix_local": tmp_path / "local", "posix_prefix": tmp_path}
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(folders[scheme])})
    (tmp_path / "Python.h").touch()
    assert header() == str(tmp_path)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("/usr/include/python3.99", f"run, as root: apt install python3.{MINOR}-dev"),
        ("/opt/python/include/python3.99", "came without its headers"),  # no package of the system would help
    ],
)
def test_a_missing_header_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, words: str) -> None:
    monkeypatch.setattr(surroundings, "_OS_RELEASE", _release(tmp_path, "ID=ubuntu\nID_LIKE=debian\n"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": folder})
    with pytest.raises(Missing, match=words):
        header()


def test_the_drivers_library_is_found_where_triton_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_linked", lambda: [])
    monkeypatch.delenv("TRITON_LIBCUDA_PATH", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path}")
    with pytest.raises(Missing, match="ldconfig"):
        driver_library()
    (tmp_path / "libcuda.so.1").touch()
    assert driver_library() == str(tmp_path / "libcuda.so.1")
    monkeypatch.delenv("LD_LIBRARY_PATH")
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    assert driver_library() == str(tmp_path / "libcuda.so.1")


def test_the_folder_of_compiled_kernels_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(writable_folder())
    assert folder == tmp_path / "cache" / "verbatim" / "triton"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(folder.iterdir())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    assert Path(writable_folder()) == tmp_path / "other"


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/none/triton")
    with pytest.raises(Missing, match=r"/proc/none/triton cannot be written .* set XDG_CACHE_HOME"):
        writable_folder()

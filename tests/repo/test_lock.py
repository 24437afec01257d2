"""The lock: what is installed is what was tried, from where it says, and the ranges end where trying ended."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "requirements"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
BUILD = [Requirement(text) for text in PYPROJECT["build-system"]["requires"]]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(text) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts]
PACKAGES = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
RERUN = "run: make lock"

Pinned = dict[tuple[str, str], set[str]]
"""Hashes by name and version."""


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", LOCKS / "lock.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pinned(file: str) -> Pinned:
    """A requirements file; every line of it must be a pin with hashes, a note or the index of torch's CPU builds."""
    found: Pinned = {}
    for line in (LOCKS / file).read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("#") or line == "--extra-index-url https://download.pytorch.org/whl/cpu":
            continue
        match = re.fullmatch(
            r"([a-z0-9-]+)(?:\[[a-z,]+\])?==([^\s;]+)(?: ; [^-]+?(?:-[^-]+?)*?)?((?:\s+--hash=\S+)+)", line
        )
        assert match, f"{file}: {line[:80]}"
        found[match[1], match[2]] = set(re.findall(r"--hash=(sha256:[0-9a-f]{64})(?:\s|$)", match[3]))
        assert found[match[1], match[2]], f"{file}: {line[:80]} has no hash"
    return found


def _locked(lock: ModuleType, *, cuda: bool) -> Pinned:
    found = {}
    for package in PACKAGES:
        if "registry" in package["source"] and bool(lock._CUDA.fullmatch(package["name"])) == cuda:
            files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
            found[package["name"], package["version"]] = {file["hash"] for file in files}
    return found


def test_everything_comes_from_the_package_index() -> None:
    """A lock that names a mirror would send every reader there."""
    hosts = set(re.findall(r"https?://([^/\"]+)", (ROOT / "uv.lock").read_text(encoding="utf-8")))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


def test_the_lock_is_of_this_pyproject() -> None:
    """A range that was changed without locking again."""
    [project] = [package for package in PACKAGES if package["name"] == PROJECT["name"]]
    locked = {
        (entry["name"], entry.get("specifier", ""), entry.get("marker", ""))
        for entry in project["metadata"]["requires-dist"]
    }
    expected = {(canonicalize_name(r.name), r.specifier) for r in DIRECT}
    assert {name for name, _, _ in locked} == {name for name, _ in expected}, RERUN
    for name, specifier, _ in locked:
        assert any(name == n and Requirement(f"x{specifier}").specifier == s for n, s in expected), f"{name}: {RERUN}"


def test_the_exports_are_of_this_lock(lock: ModuleType) -> None:
    dev = _pinned("dev.txt")
    assert dev == _locked(lock, cuda=False), RERUN
    assert _pinned("torch-cu130.txt") == _locked(lock, cuda=True), RERUN
    assert (LOCKS / "torch-cpu.txt").read_text(encoding="utf-8") == lock.cpu_build(PACKAGES), RERUN
    assert (LOCKS / "triton.txt").read_text(encoding="utf-8") == lock.interpreter(PACKAGES), RERUN
    assert (ROOT / "engine" / "loading" / "tried.json").read_text(encoding="utf-8") == lock.tried(PACKAGES), RERUN
    runtime = _pinned("runtime.txt")
    assert runtime.items() <= dev.items()
    assert {name for name, _ in dev} - {name for name, _ in runtime} >= {"pytest", "mypy", "ruff"}
    # The project itself is built without isolation, by what is installed.
    assert {r.name for r in BUILD} <= {name for name, _ in runtime}


def _platforms(machine: str) -> list[str]:
    """Tags of the oldest systems that are served: glibc 2.31 (decision 0016), macOS 14 on Apple's processors."""
    if machine == "macos":
        return [f"macosx_{n}_0_{kind}" for n in range(14, 10, -1) for kind in ("arm64", "universal2")] + [
            f"macosx_10_{n}_universal2" for n in range(16, 3, -1)
        ]
    return [
        *(f"manylinux_2_{n}_{machine}" for n in range(31, 4, -1)),
        f"manylinux2014_{machine}",
        f"manylinux1_{machine}",
    ]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "macos"])
@pytest.mark.parametrize("python", ["311", "312", "313", "314"])
def test_every_python_has_its_wheels(python: str, machine: str) -> None:
    """`--only-binary :all:` finds a wheel of everything: nothing is compiled, and no build fetches what it likes."""
    version = (3, int(python[1:]))
    platforms = _platforms(machine)
    fits = {*cpython_tags(version, platforms=platforms), *compatible_tags(version, f"cp{python}", platforms)}
    torch = [line.split()[1] for line in (LOCKS / "torch-cpu.sha256").read_text(encoding="utf-8").splitlines()]
    assert machine == "macos" or any(fits & parse_wheel_filename(name)[3] for name in torch)
    for package in PACKAGES:
        if machine == "macos" and package["name"].startswith(("nvidia-", "cuda-", "triton")):
            continue  # of the CUDA build, which is for Linux
        markers = package.get("resolution-markers", [])
        here = not markers or any(Marker(m).evaluate({"python_full_version": f"3.{python[1:]}.1"}) for m in markers)
        if "registry" in package["source"] and here:
            names = [unquote(wheel["url"].rsplit("/", 1)[1]) for wheel in package.get("wheels", [])]
            assert any(fits & parse_wheel_filename(name)[3] for name in names), f"{package['name']}: {names[:3]}"


@pytest.mark.parametrize("requirement", [*BUILD, *DIRECT], ids=lambda r: r.name)
def test_a_range_ends_at_the_last_minor_release_that_was_tried(requirement: Requirement) -> None:
    """numpy 2.4.6 in the lock, `<2.5` in pyproject.toml: what nobody has tried is not installed unasked."""
    versions = [Version(p["version"]) for p in PACKAGES if p["name"] == canonicalize_name(requirement.name)]
    assert versions
    bounds = {s.operator: Version(s.version) for s in requirement.specifier}
    assert set(bounds) == {">=", "<"}
    newest = max(versions)
    assert bounds["<"] == Version(f"{newest.major}.{newest.minor + 1}")
    assert bounds[">="] <= newest


def test_tests_run_kernels_with_the_release_that_a_gpu_runs_them_with(lock: ModuleType) -> None:
    assert _pinned("triton.txt").items() <= _pinned("torch-cu130.txt").items()
    [release] = _pinned("triton.txt")
    assert release[0] == "triton"


def _make(folder: Path, *arguments: str, driver: str = "", target: str = "install") -> subprocess.CompletedProcess[str]:
    """What `make TARGET` would do with the environment in `folder`; `driver`: the version that `nvidia-smi` says."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text(f"#!/bin/sh\necho {driver}\n" if driver else "#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    smi.chmod(0o755)
    environment = {**os.environ, "PATH": f"{smi.parent}:{os.environ['PATH']}"}
    environment.pop("TORCH", None)
    given: list[Any] = [f"VENV={folder / 'venv'}", *([] if driver else ["DRIVER="]), *arguments]
    command = ["make", "--no-print-directory", "-n", target, *given]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("installed", "driver", "arguments", "build", "afresh"),
    [
        (None, "", [], "cpu", False),
        (None, "580.65.06", [], "cu130", False),
        (None, "580.65.06", ["TORCH=cpu"], "cpu", False),
        ("cu130", "", [], "cu130", False),  # chosen once, it stays
        ("cpu", "595.1", [], "cpu", False),
        ("cpu", "595.1", ["TORCH=cu130"], "cu130", True),  # pip would take 2.13.0+cpu for 2.13.0
        ("half", "580.65.06", [], "cu130", True),  # a CPU build whose installation was not finished
        ("half", "", [], "cpu", False),
        (None, "550.54.15", [], "cpu", False),  # too old for CUDA 13: torch would see no GPU
        (None, "550.54.15", ["TORCH=cu130"], "cu130", False),
        ("old", "", [], "cpu", True),  # from before there was a lock
    ],
)
def test_one_switch_chooses_the_build_of_torch(
    tmp_path: Path, installed: str | None, driver: str, arguments: list[str], build: str, afresh: bool
) -> None:
    if installed == "half":
        (tmp_path / "venv/lib/python3.11/site-packages/torch-2.13.0+cpu.dist-info").mkdir(parents=True)
    elif installed:
        stamp = tmp_path / "venv" / (".installed" if installed == "old" else f".installed-{installed}")
        stamp.parent.mkdir()
        stamp.touch()
        os.utime(stamp, (0, 0))  # older than the lock
    done = _make(tmp_path, *arguments, driver=driver)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"-r requirements/torch-(\w+)\.txt", done.stdout)) == {build}
    assert ("venv --clear" in done.stdout) == afresh
    assert f"with torch for {build} (another: make install TORCH=" in done.stdout
    installs = re.findall(r"-m pip install (?!.*--editable)(.*)", done.stdout)
    assert all("--require-hashes" in line and "--no-deps" in line for line in installs)
    assert len(installs) == 3


def test_another_build_is_refused_by_name(tmp_path: Path) -> None:
    done = _make(tmp_path, "TORCH=cu126")
    assert done.returncode != 0
    assert "TORCH=cu126 is not a build of torch; write one of: cpu cu130" in done.stderr


@pytest.mark.parametrize("target", ["test", "quick", "check"])
@pytest.mark.parametrize(
    ("build", "system", "wanted"),
    [
        ("cpu", "Linux-x86_64", True),
        ("cpu", "Linux-aarch64", True),
        ("cpu", "Darwin-arm64", False),  # there is no Triton for it
        ("cu130", "Linux-x86_64", False),  # brings its own
    ],
)
def test_tests_bring_the_interpreter_of_kernels(
    tmp_path: Path, target: str, build: str, system: str, wanted: bool
) -> None:
    done = _make(tmp_path, f"TORCH={build}", f"SYSTEM={system}", target=target)
    assert done.returncode == 0, done.stderr
    [line, *more] = re.findall(r"-m pip install (.*-r requirements/triton\.txt)", done.stdout) or [""]
    assert bool(line) == wanted
    assert not more
    assert not wanted or ("--require-hashes" in line and "--no-deps" in line)


@pytest.mark.parametrize("target", ["install", "serve"])
def test_serving_needs_no_interpreter_of_kernels(tmp_path: Path, target: str) -> None:
    done = _make(tmp_path, "TORCH=cpu", "SYSTEM=Linux-x86_64", target=target)
    assert done.returncode == 0, done.stderr
    assert "triton" not in done.stdout


def test_the_interpreters_stamp_is_no_build_of_torch(tmp_path: Path) -> None:
    """It is the first by name in a folder of stamps, and alone if the installation of another build was begun."""
    for name in (".installed-triton", ".installed-cu130"):
        stamp = tmp_path / "venv" / name
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()
        os.utime(stamp, (0, 0))
        done = _make(tmp_path)
        assert done.returncode == 0, done.stderr
        assert set(re.findall(r"-r requirements/torch-(\w+)\.txt", done.stdout)) == {
            "cpu" if name == ".installed-triton" else "cu130"
        }

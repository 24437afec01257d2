"""What a user installs: every install line in the documents, and what is in the wheel."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from engine import ModelConfig
from engine.checkpoints.checkpoint import locate

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "server"))

from live_server import start  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = {
    canonicalize_name(Requirement(text).name) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts
}
WITH_VALUE = {"-r", "--requirement", "-c", "--constraint", "-d", "--dest", "-f", "--find-links", "--only-binary"}
INDEXES = {"-i", "--index-url", "--extra-index-url"}
_INSTALL = re.compile(r"\b(?:pip3?|uv pip) (?:install|download|wheel)\b([^`\n#;]*)")


# -- the lines that people copy --------------------------------------------------------------------------------------


def _install_lines(text: str) -> list[str]:
    """The arguments of every `pip install`, `download` or `wheel`; lines that were broken are joined."""
    text = re.sub(r'"\s*\n\s*f?"', "", text.replace("\\\n", " "))
    return [match.strip().rstrip('.,"') for match in _INSTALL.findall(text)]


def _fault(arguments: str) -> str | None:
    """What is wrong with the arguments of pip: a package that is a stranger's, an unknown extra, a missing file."""
    words = iter(shlex.split(arguments))
    for word in words:
        option, _, value = word.partition("=")
        if option in INDEXES:
            if (value or next(words, "")) != "https://download.pytorch.org/whl/cpu":
                return f"another index than torch's: {word}"
        elif option in WITH_VALUE:
            value = value or next(words, "")
            if option in {"-r", "--requirement"} and not (ROOT / value).is_file():
                return f"there is no {value}"
        elif not word.startswith("-") and (fault := _fault_of_package(word)):
            return fault
    return None


def _fault_of_package(word: str) -> str | None:
    place, _, rest = word.partition("[")
    extras = [name for name in rest.rstrip("]").split(",") if name]
    if place in {".", "./"} or re.fullmatch(r"(?:\S*/)?verbatim_server-[^/]*\.whl", place):
        return next((f"no extra is called {name}" for name in extras if name not in EXTRAS), None)
    try:
        name = canonicalize_name(Requirement(word).name)
    except InvalidRequirement:
        return f"{word} is neither a package nor this checkout"
    return None if name in OURS else f"{name} is not ours and not among our dependencies"


def _sources() -> list[Path]:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("demo/*.md"), *ROOT.glob("benchmarks/*.md")]
    code = [
        p for folder in ("engine", "server", "demo", "examples", "benchmarks") for p in ROOT.glob(f"{folder}/**/*.py")
    ]
    return sorted([*pages, *code, *ROOT.glob("docs/*.py"), ROOT / "models.yaml"])


def test_every_install_line_fetches_what_is_meant() -> None:
    """`verbatim` and `verbatim-server` in the public index are not this project: extras come from the checkout."""
    seen = []
    for path in _sources():
        for line in _install_lines(path.read_text(encoding="utf-8")):
            seen.append((path.relative_to(ROOT).as_posix(), line))
            assert _fault(line) is None, f"{path.relative_to(ROOT)}: pip install {line}: {_fault(line)}"
    assert {"engine/checkpoints/gguf_file.py", "docs/guides/sharing.md", "docs/guides/air-gap.md"} <= {
        name for name, _ in seen
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`pip install 'verbatim[postgres]'`", "verbatim is not ours"),
        ("$ pip install verbatim-server", "verbatim-server is not ours"),
        ("$ .venv/bin/python -m pip install --quiet '.[postgress]'   # the extra", "no extra is called postgress"),
        ("$ pip install --extra-index-url https://example.org/simple torch", "another index"),
        (
            "$ pip download -d wheels --require-hashes -r requirements/nothing.txt",
            "there is no requirements/nothing.txt",
        ),
        ('f"needs it: pip install "\n    "psycopgg."', "psycopgg is not ours"),
        ("$ pip download -d wheels \\\n    requests-toolbelt", "requests-toolbelt is not ours"),
        ("`pip install '.[postgres]'`", None),
        ("`pip install gguf.` and more", None),
        ("$ pip install dist/verbatim_server-0.1.0-py3-none-any.whl[gguf]", None),
        ("$ pip download -d wheels --require-hashes -r requirements/runtime.txt", None),
    ],
)
def test_a_strangers_package_would_be_seen(text: str, fault: str | None) -> None:
    [line] = _install_lines(text)
    assert (_fault(line) or "").startswith(fault or "")
    assert (_fault(line) is None) == (fault is None)


# -- the demo model and the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, without what is ignored, so that building leaves nothing in it."""
    target = tmp_path_factory.mktemp("tree") / "verbatim"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "results")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", params=["checkout", pytest.param("sdist", marks=pytest.mark.sweep)])
def wheel(request: pytest.FixtureRequest, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of `pip install .`, and of a source distribution; no network."""
    out = tmp_path_factory.mktemp("wheel")
    source = "."
    if request.param == "sdist":
        _run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=tree)
        [archive] = out.glob("verbatim_server-*.tar.gz")
        with tarfile.open(archive) as file:
            assert not [name for name in file.getnames() if "/tests/" in name]
        source = str(archive)
    _run("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(out), source, cwd=tree)
    [found] = out.glob("*.whl")
    return found


def test_a_checkout_serves_the_model_that_is_trained_in_it() -> None:
    """`builtin: demo` and models.yaml's `path: demo/model` are one model, with one fingerprint."""
    assert locate(ModelConfig(id="demo", builtin="demo"), pull=False) == ROOT / "demo" / "model"


@pytest.mark.slow
def test_the_wheel_holds_what_serves_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        model = {n for n in names if n.startswith("engine/demo_model/")}
        for name in model:
            assert archive.read(name) == (ROOT / "demo" / "model" / name.rsplit("/", 1)[1]).read_bytes()
    packages = {
        p.relative_to(ROOT).as_posix() for folder in ("engine", "server") for p in ROOT.glob(f"{folder}/**/*.py")
    }
    data = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("engine/compute/cpu/native/*.[ch]")}
    data |= {"engine/loading/tried.json"}
    data |= {"engine/__init__.pyi", "engine/py.typed", "server/py.typed"}
    page = ROOT / "server" / "page" / "built"
    data |= {p.relative_to(ROOT).as_posix() for p in (page / "index.html", *(page / "assets").iterdir())}
    assert model == {f"engine/demo_model/{path.name}" for path in (ROOT / "demo" / "model").iterdir()}
    lock = {f"server/bundle/lock/{name}.txt" for name in ("runtime", "torch-cpu", "torch-cu130")}
    assert {name for name in names if not name.startswith(info)} == packages | data | model | lock
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names
    assert "\nName: verbatim-server\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "verbatim = server.cli:main" in entry_points


@pytest.mark.slow
def test_the_wheel_serves_the_demo_model_from_anywhere(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, in an empty folder, without a models.yaml."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    where = "import engine.checkpoints.noise_checkpoint as s; print(s.demo_model())"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd="/", capture_output=True, text=True, check=True, timeout=60
    )
    assert Path(done.stdout.strip()) == (tmp_path / "site" / "engine" / "demo_model").resolve()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    with start([], folder) as server:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Sort these words: pear, apple."}]}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "temperature": 0}, timeout=60).json()
        page = httpx.get(server.url, headers={"accept": "text/html"}).text
    assert re.search(r"apple.*pear", reply["choices"][0]["message"]["content"])
    assert '<div id="page">' in page
    assert not list(folder.glob("verbatim.db*"))


@pytest.mark.slow
def test_an_installed_copy_can_write_its_own_wheel(wheel: Path, tmp_path: Path) -> None:
    """For a bundle that is made where there is no checkout: the same files, and a record that is true."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import pathlib, server.bundle.wheels as w; assert w.checkout() is None; assert w.lock_folder().is_dir(); "
        f"w._repack(pathlib.Path({str(tmp_path)!r}))"
    )
    environment = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    written = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(written) as again:
        assert sorted(again.namelist()) == sorted(archive.namelist())
        for name in again.namelist():
            assert name.endswith("/RECORD") or again.read(name) == archive.read(name)
    target = str(tmp_path / "again")
    _run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, str(written), cwd=tmp_path)
    assert (tmp_path / "again" / "server" / "bundle" / "lock" / "runtime.txt").exists()

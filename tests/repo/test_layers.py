"""The layers are a test: which package may import which, and what is absent on purpose."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ENGINE = (
    "errors types config cache_folder host_memory devices confined",
    "text templates",
    "replies",
    "grammar prompts",
    "receipts",
    "scheduling sampling",
    "compute",
    "compute.cpu compute.cuda",
    "checkpoints",
    "adapters",
    "model",
    "loading",
    "preparation choice running faults",
    "engine",
    "llm serving",
    "verification",
)
"""The engine from the ground up. A package imports packages on lower lines, and of its own line those before it."""

SERVER = (
    "json_text hosts settings",
    "logs terminal ledger fingerprints progress",
    "configuration errors gpu_probe",
    "wire accounts receipts metrics page",
    "api",
    "app",
    "lifecycle",
    "batch catalog bundle run",
    "commands",
    "cli",
)
"""The same for the server, which sees of the engine nothing but its public face."""

NO_TORCH = {
    "errors",
    "types",
    "config",
    "cache_folder",
    "host_memory",
    "confined",
    "text",
    "templates",
    "replies",
    "grammar",
}
NO_TORCH |= {"prompts", "receipts", "scheduling"}

FREE_OF_TIME_AND_THREADS = {"types", "config", "text", "templates", "replies", "grammar", "prompts", "scheduling"}
FREE_OF_TIME_AND_THREADS |= {
    "sampling",
    "compute",
    "compute.cpu",
    "compute.cuda",
    "checkpoints",
    "adapters",
    "preparation",
    "choice",
    "running",
    "faults",
    "engine",
    "receipts",
}
EXEMPT = {
    "engine/grammar/trial.py": "a trial of a grammar has a clock",
    "engine/grammar/mask_worker.py": "slow masks are computed on a thread of their own",
}

LONGEST_FOLDER = 12
"""Files of a folder, its `__init__.py` aside."""


def _packages(order: tuple[str, ...]) -> list[str]:
    return " ".join(order).split()


def _files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _package(module: str, order: tuple[str, ...]) -> str:
    """The longest name in `order` that a module lies in."""
    inner = module.split(".", 1)[1]
    found = [name for name in _packages(order) if inner == name or inner.startswith(f"{name}.")]
    assert found, f"{module} is in no package of tests/repo/test_layers.py"
    return max(found, key=len)


def _imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Dotted names of imported modules; `everywhere` counts those inside functions, too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else iter(tree.body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if (ROOT / f"{name.replace('.', '/')}.py").exists())


CODE = [*_files("engine"), *_files("server")]
INNER = [path for path in CODE if path.parent.name not in ("",) and path != ROOT / "engine/__init__.py"]
IDS = [_module(path) for path in CODE]


@pytest.mark.parametrize(("root", "order"), [("engine", ENGINE), ("server", SERVER)])
def test_imports_run_downward(root: str, order: tuple[str, ...]) -> None:
    """No import climbs, and so no circle of packages can be."""
    places = {name: i for i, name in enumerate(_packages(order))}
    for path in _files(root):
        module = _module(path)
        if module == root:
            continue
        mine = _package(module, order)
        others = {_package(name, order) for name in _imports(path) if name.startswith(f"{root}.")} - {mine}
        climbing = {other for other in others if places[other] > places[mine]}
        assert not climbing, f"{module} imports {climbing}"


def test_the_order_names_what_there_is() -> None:
    for root, order in (("engine", ENGINE), ("server", SERVER)):
        found = {_package(_module(path), order) for path in _files(root) if _module(path) != root}
        assert found == set(_packages(order))


def test_the_engine_does_not_know_the_server() -> None:
    for path in _files("engine"):
        assert not any(name.split(".")[0] == "server" for name in _imports(path)), path


def test_the_server_sees_only_the_face_of_the_engine() -> None:
    for path in _files("server"):
        names = set(_imports(path))
        assert not {name for name in names if name.startswith("engine.")}, path
        assert not {"torch", "transformers", "accelerate"} & {name.split(".")[0] for name in names}, path


def test_no_folder_is_long() -> None:
    for folder in {path.parent for path in CODE}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= LONGEST_FOLDER, f"{folder.relative_to(ROOT)} has {len(files)} files"


@pytest.mark.parametrize("package", sorted(NO_TORCH))
def test_pure_packages_load_no_torch(package: str) -> None:
    for path in _files("engine"):
        if _module(path) != "engine" and _package(_module(path), ENGINE) == package:
            assert not {"torch", "transformers"} & {name.split(".")[0] for name in _imports(path, everywhere=False)}


@pytest.mark.parametrize("package", sorted(FREE_OF_TIME_AND_THREADS))
def test_no_clock_no_thread_no_network(package: str) -> None:
    banned = {"time", "threading", "asyncio", "socket", "random", "http", "urllib", "requests", "httpx", "concurrent"}
    for path in _files("engine"):
        if path.relative_to(ROOT).as_posix() in EXEMPT or _module(path) == "engine":
            continue
        if _package(_module(path), ENGINE) == package:
            assert not banned & {name.split(".")[0] for name in _imports(path)}, path


@pytest.mark.parametrize("path", CODE, ids=IDS)
def test_no_mutable_module_state(path: Path) -> None:
    """Two engines in one process must not share anything that changes. Tables in capitals are constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path.name}:{node.lineno} uses global"
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        mutable = isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
        for target in targets:
            if isinstance(target, ast.Name) and mutable:
                constant = target.id.lstrip("_").isupper() or target.id == "__all__"
                assert constant, f"{path.name}:{node.lineno}: {target.id} is mutable module state"


@pytest.mark.parametrize("path", CODE, ids=IDS)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring) > 25


def test_the_public_face_is_what_it_says() -> None:
    import engine

    assert "LLM" in dir(engine)
    for name in dir(engine):
        assert getattr(engine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        engine.nope  # noqa: B018
    everything: dict[str, object] = {}
    exec("from engine import *", everything)
    assert set(dir(engine)) <= set(everything)


@pytest.mark.parametrize(
    "module",
    [
        "engine",
        "server.cli",
        "engine.loading.gpu.probe",
        "server.api.chat_request",
        "engine.scheduling.scheduler",
        "engine.templates.chat_template",
    ],
)
def test_a_light_import_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

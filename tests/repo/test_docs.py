"""The documents are held like code: what they name exists, what they link resolves, what they show parses."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from engine import parse_models
from server.cli import app
from server.settings import read_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
PYTHON = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("engine", "server", "tests", "examples", "benchmarks", "evaluations", "docs", "requirements")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
)
CODE = "\n".join(p.read_text(encoding="utf-8") for p in (*ROOT.glob("engine/**/*.py"), *ROOT.glob("server/**/*.py")))
ELSEWHERE = {"HF_HOME", "PYTHON", "ARGS", "TORCH", "PIP_FIND_LINKS"}
"""Variables of other programs, or of make."""
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _blocks(*languages: str) -> list[tuple[str, str]]:
    found = []
    for path in PAGES:
        for number, match in enumerate(_FENCE.finditer(_text(path))):
            if match[1] in languages:
                found.append((f"{_name(path)}#{number}", match[2]))
    return found


def _anchors(path: Path) -> set[str]:
    """Headings as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", _text(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says(generator: ModuleType) -> None:
    written = {path.name: _text(path) for path in (ROOT / "docs" / "reference").glob("*.md")}
    # The latter two are written by `make zoo` and `make clients`.
    del written["families.md"], written["architectures.md"], written["clients.md"]
    assert written == generator.generate(), "run: python docs/generate.py"


def test_the_table_of_families_is_what_the_code_finds(generator: ModuleType, shared: Path) -> None:
    """With the publishers' templates, which are not part of the repository."""
    assert _text(ROOT / "docs" / "reference" / "families.md") == generator.families(shared / "chat_templates")


def test_the_readme_is_short() -> None:
    assert len(_text(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_resolve(path: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", _text(path))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{_name(path)} links to {target}"
        if anchor:
            assert anchor in _anchors(found), f"{_name(path)} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_files_and_tests_that_are_named_exist(path: Path) -> None:
    tests = {file.name for file in ROOT.glob("tests/**/test_*.py")}
    for name in re.findall(r"`(test_\w+\.py)`", _text(path)):
        assert name in tests, f"{_name(path)} names {name}"
    for name, test in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml))(?:::(\w+))?`", _text(path)):
        file = ROOT / name
        assert file.exists(), f"{_name(path)} names {name}"
        if test:
            assert re.search(rf"^(async )?def {test}\(", _text(file), re.MULTILINE), (
                f"{_name(path)} names {name}::{test}"
            )


def test_architecture_names_every_file() -> None:
    text = _text(ROOT / "ARCHITECTURE.md")
    files = [_name(p) for folder in ("engine", "server") for p in ROOT.glob(f"{folder}/**/*.py")]
    missing = [name for name in files if f"`{name}`" not in text and not name.endswith("__init__.py")]
    assert not missing


@pytest.mark.parametrize(("where", "code"), _blocks("python", "py"), ids=lambda v: v if "#" in v[:80] else "code")
def test_python_blocks_parse_and_import_what_exists(where: str, code: str) -> None:
    for node in ast.walk(ast.parse(code, where)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{where} imports {alias.name}"


@pytest.mark.parametrize(("where", "text"), _blocks("yaml"), ids=lambda v: v if v.endswith(tuple("0123456789")) else "")
def test_yaml_blocks_are_good_configurations(where: str, text: str) -> None:
    data = yaml.safe_load(text)
    assert "models" in data, f"{where} is no models.yaml"
    read_settings(data, where)
    assert parse_models(data["models"], base=ROOT, where=where)


def test_the_shipped_configuration_is_good() -> None:
    data = yaml.safe_load(_text(ROOT / "models.yaml"))
    read_settings(data, "models.yaml")
    assert parse_models(data["models"], base=ROOT, where="models.yaml")


def _commands() -> dict[str, set[str]]:
    """`serve` → its options, `models check` → its options, …"""
    found = {}
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        for inner, leaf in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = {o for p in leaf.params for o in (*p.opts, *p.secondary_opts)}
    return found


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_commands_and_flags_that_are_named_exist(path: Path) -> None:
    commands = _commands()
    for line in re.findall(r"(?:^\$ (?:\S*/)?|`)verbatim ([a-z][^`\n#]*)", _text(path), re.MULTILINE):
        if any(name.startswith(f"{line.strip()} ") for name in commands):
            continue  # a group of commands
        known = next((options for name, options in commands.items() if line.startswith(name)), None)
        assert known is not None, f"{_name(path)}: verbatim {line}"
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", line)) <= known, f"{_name(path)}: verbatim {line}"
    every = set().union(*commands.values())
    for flag in re.findall(r"`(--[a-z][\w-]*)[^`]*`", _text(path)):
        assert flag in every or flag in PYTHON, f"{_name(path)} names {flag}"


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_make_targets_that_are_named_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", _text(path), re.MULTILINE)) <= targets


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_variables_that_are_named_exist(path: Path) -> None:
    """Environment variables and constants, in capitals: `MKL_CBWR`, `XDG_CACHE_HOME`."""
    for name in re.findall(r"[`$]([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)\b", _text(path)):
        assert name in PYTHON or name in ELSEWHERE, f"{_name(path)} names {name}"


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent.name != "benchmarks"], ids=_name)
def test_nothing_of_the_desk_it_was_written_at(path: Path) -> None:
    assert not re.search(r"/work/|/tmp/|/home/|\.\./shared", _text(path))


def test_messages_shown_in_troubleshooting_are_the_codes() -> None:
    """Of each message the longest constant part stands in the code, so that a search finds this page."""
    text = re.sub(r'"\s*\n\s*f?"', "", CODE)
    for message in re.findall(r"^\| `([^`]+)` \|", _text(ROOT / "docs/guides/troubleshooting.md"), re.MULTILINE):
        words = re.findall(r"[a-z][a-z ]{8,}[a-z]", message)
        assert any(part in text for part in words), message

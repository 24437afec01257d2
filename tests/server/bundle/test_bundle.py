"""A bundle: complete, with real files, refused after any change, and never half made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters_for_tests as adapters
import pytest
import yaml
from typer.testing import CliRunner

import server.bundle.create
from engine import ConfigError, ModelConfig, generate_key, parse_models, read_yaml
from server import cli
from server.bundle import wheels
from server.bundle.check import check_bundle
from server.bundle.checksums import FILE, read_checksums, write_checksums
from server.bundle.create import BundleJob, create_bundle, read_public_key
from server.bundle.models import copy_models

DEMO = ModelConfig(id="demo", builtin="demo", max_completion_tokens=9)
PUBLIC = "-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----\n"


@pytest.fixture(autouse=True)
def _two_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network in these tests: two files stand for the wheels."""

    def collect(target: Path, build: str) -> None:
        (target / "torch-2.0+cpu-cp311-none-any.whl").write_bytes(b"torch")
        (target / "my_package-1.0-py3-none-any.whl").write_bytes(b"package")

    monkeypatch.setattr(server.bundle.create, "collect_wheels", collect)


def make(target: Path, *entries: ModelConfig, key: Path | None = None) -> Path:
    create_bundle(
        BundleJob(target, entries or (DEMO,), "cpu", None if key is None else read_public_key(key)), lambda text: None
    )
    return target


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path / "made")


def test_a_bundle_is_complete(made: Path, tmp_path: Path) -> None:
    assert not list(check_bundle(made))
    assert (
        subprocess.run(["sha256sum", "--strict", "-c", FILE], cwd=made, capture_output=True, check=False).returncode
        == 0
    )
    assert (made / "requirements.txt").read_text().splitlines()[0].startswith("my_package==1.0 --hash=sha256:")
    [entry] = parse_models(read_yaml(made / "models.yaml")["models"], base=made, where="models.yaml")
    assert (entry.id, entry.path, entry.max_completion_tokens) == ("demo", made / "models" / "demo", 9)
    source = Path(wheels.__file__).parents[2] / "demo" / "model"
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert {path.name: path.read_bytes() for path in entry.path.iterdir()} == files
    assert (entry.path / "config.json").stat().st_mtime == (source / "config.json").stat().st_mtime
    assert not list(tmp_path.glob("*.partial"))
    moved = made.rename(tmp_path / "elsewhere")
    assert not list(check_bundle(moved))


CHANGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("content", lambda b: (b / "models/demo/config.json").write_text("{}"), "models/demo/config.json is not what"),
    ("missing", lambda b: (b / "models/demo/config.json").unlink(), "models/demo/config.json is missing"),
    ("extra", lambda b: (b / "models/demo/x.py").write_text(""), "models/demo/x.py is not in checksums.sha256"),
    ("hidden", lambda b: (b / ".pip.conf").write_text(""), ".pip.conf is not in"),
    ("extra wheel", lambda b: (b / "wheels/x-1-py3-none-any.whl").write_text(""), "x-1-py3-none-any.whl is not in"),
    ("a link in place of a file", lambda b: _linked(b / "install.sh"), "install.sh is no regular file"),
    ("a link to a folder", lambda b: (b / "more").symlink_to("/etc"), "more is not in|more is no regular file"),
    ("a pipe", lambda b: os.mkfifo(b / "pipe"), "pipe is no regular file"),
    ("outside", lambda b: _line(b, "0" * 64 + "  ../passwd"), "names '../passwd', which is no file of this folder"),
    ("absolute", lambda b: _line(b, "0" * 64 + "  /etc/passwd"), "names '/etc/passwd'"),
    ("not simple", lambda b: _line(b, "0" * 64 + "  ./install.sh"), "names './install.sh'"),
    ("twice", lambda b: _line(b, "0" * 64 + "  install.sh"), "names 'install.sh' again"),
    ("prose", lambda b: _line(b, "all is well"), "is not a checksum and a name"),
    ("no checksums", lambda b: (b / FILE).unlink(), "is not a bundle"),
    (
        "a pipe as checksums",
        lambda b: ((b / FILE).unlink(), os.mkfifo(b / FILE)),
        "is not a bundle: .* no regular file",
    ),
    ("binary", lambda b: (b / FILE).write_bytes(b"\xff\xfe"), "is not a bundle: .* not UTF-8"),
    ("requirements", lambda b: _again(b, "requirements.txt", "torch==2.0", "torch==2.1"), "no wheel of torch 2.1"),
    ("no hash", lambda b: _again(b, "requirements.txt", " --hash.*", ""), "line 1 is not a release with one hash"),
    (
        "another hash",
        lambda b: _again(b, "requirements.txt", "sha256:..", "sha256:00"),
        "another hash than requirements",
    ),
    ("an option", lambda b: _again(b, "requirements.txt", "^", "--index-url http://x\n"), "line 1 is not a release"),
    ("another path", lambda b: _again(b, "models.yaml", "path: .*", "path: /etc"), "path: /etc is not in this folder"),
    ("a path out", lambda b: _again(b, "models.yaml", "path: .*", "path: ../x"), "path: ../x is not in this folder"),
    ("a hub id", lambda b: _again(b, "models.yaml", "path: .*", "repo: a/b"), "does not say where its model lies"),
    (
        "no list of models",
        lambda b: ((b / "models.yaml").unlink(), write_again(b)),
        "models.yaml is missing: there are",
    ),
    ("no models", lambda b: _again(b, "models.yaml", "(?s).*", "x: 1"), "models.yaml: 'models' must be a list"),
]


def _linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _line(bundle: Path, line: str) -> None:
    with (bundle / FILE).open("a") as file:
        file.write(line + "\n")


def write_again(bundle: Path) -> None:
    (bundle / FILE).unlink()
    write_checksums(bundle)


def _again(bundle: Path, name: str, pattern: str, text: str) -> None:
    """Change a file and write all checksums again, as somebody would who means it."""
    path = bundle / name
    path.write_text(re.sub(pattern, text, path.read_text(), count=1))
    write_again(bundle)


@pytest.mark.parametrize(("change", "words"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_any_change_is_a_fault(made: Path, change: Callable[[Path], Any], words: str) -> None:
    change(made)
    faults = list(check_bundle(made))
    assert any(re.search(words, fault) for fault in faults), faults
    result = CliRunner().invoke(cli.app, ["bundle", "check", str(made)])
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == len(faults)


def test_check_prints_one_line_for_what_is_good(made: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bundle", "check", str(made)])
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)


def test_a_folder_that_cannot_be_read_is_a_fault(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in it is not known: it could hold anything."""
    scan = os.scandir
    (made / "shut").mkdir()

    def refuse(path: Any) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(check_bundle(made)) == [f"{made / 'shut'} cannot be read: Permission denied."]


def test_a_name_cannot_forge_a_line(made: Path) -> None:
    (made / "a\nb is fine").write_text("")
    result = CliRunner().invoke(cli.app, ["bundle", "check", str(made)])
    assert result.stdout.splitlines() == ["a\\x0ab is fine is not in checksums.sha256."]


def test_checksums_of_any_text_are_read_or_faulted() -> None:
    found, faults = read_checksums(f"{'a' * 64}  x\n{'b' * 64} *y z\n\n{'c' * 64}  a\\b\n")
    assert found == {"x": "a" * 64, "y z": "b" * 64}
    assert len(faults) == 2


# -- what goes in ----------------------------------------------------------------------------------------------------


def test_models_of_every_kind(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with other things in it, a GGUF file, a hub id in the cache, and templates beside them."""
    folder = tmp_path / "own"
    shutil.copytree(tiny("qwen3"), folder)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "run.py", ".hidden", "LICENSE"):
        (folder / name).write_text(name)
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    cache = tmp_path / "hub" / "models--some--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for path in tiny("llama").iterdir():
        shutil.copy(path, cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    entries = (
        ModelConfig(id="a/b", path=folder, chat_template=tmp_path / "t.jinja", sampling={"temperature": 0.5}),
        ModelConfig(id="a_b", path=tmp_path / "own.gguf"),
        ModelConfig(id="../c", repo="some/model"),
    )
    made = make(tmp_path / "made", *entries)
    files = {path.relative_to(made / "models").as_posix() for path in (made / "models").rglob("*") if path.is_file()}
    assert not [path for path in made.rglob("*") if path.is_symlink()]
    kept = {path.name for path in tiny("qwen3").iterdir()} | {"LICENSE"}
    assert {f for f in files if f.startswith("a_b/")} == {f"a_b/{name}" for name in kept}
    assert {"a_b.chat_template.jinja", "a_b-2/own.gguf", "c/model.safetensors", "c/tokenizer.json"} <= files
    own, gguf, hub = parse_models(read_yaml(made / "models.yaml")["models"], base=made, where="models.yaml")
    assert (own.id, own.sampling, own.chat_template) == (
        "a/b",
        {"temperature": 0.5},
        made / "models/a_b.chat_template.jinja",
    )
    assert (gguf.path, hub.path) == (made / "models/a_b-2/own.gguf", made / "models/c")
    assert hub.id == "../c"


def test_adapters_are_copied_and_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "low", tiny("llama"), targets=("q_proj",))
    (folder / "optimizer.pt").write_bytes(b"pickled")
    entry = ModelConfig(id="x", path=tiny("llama"), adapters=[{"name": "low", "path": folder}])  # type: ignore[list-item]
    made = make(tmp_path / "made", entry)
    place = made / "models" / "x.adapters" / "low"
    assert {path.name for path in place.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    [copied] = parse_models(read_yaml(made / "models.yaml")["models"], base=made, where="models.yaml")
    assert [(one.name, one.path, one.merge) for one in copied.adapters] == [("low", place, False)]
    assert not list(check_bundle(made))
    (place / "adapter_config.json").unlink()
    write_checksums(made)
    assert any("adapter_config.json is not in this folder" in fault for fault in check_bundle(made))


def test_code_of_a_checkpoint_is_copied_where_it_runs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("qwen3"), tmp_path / "own")
    (tmp_path / "own" / "run.py").write_text("")
    copy_models([ModelConfig(id="x", path=tmp_path / "own", trust_remote_code=True)], tmp_path, pull=False)
    assert (tmp_path / "models" / "x" / "run.py").exists()


def test_the_key_of_receipts(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(PUBLIC)
    made = make(tmp_path / "made", key=tmp_path / "key")
    assert (made / "receipts-key.pem").read_text() == PUBLIC
    assert "receipts-key.pem" in (made / "README.txt").read_text()
    for text, words in (
        (PUBLIC.replace("PUBLIC", "PRIVATE"), "is a private key"),
        ("ssh-ed25519 AAAA", "not a public key in PEM format"),
    ):
        (tmp_path / "key").write_text(text)
        with pytest.raises(ConfigError, match=words):
            make(tmp_path / "other", key=tmp_path / "key")
    assert not list(tmp_path.glob("other*"))


def test_the_key_that_the_configuration_signs_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its public half goes in by itself; the private one never does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").mkdir()
    generate_key(tmp_path / "keys" / "mine")
    settings = {"models": [{"id": "demo", "builtin": "demo"}], "server": {"receipts": {"sign": "mine"}}}
    (tmp_path / "keys" / "models.yaml").write_text(yaml.safe_dump(settings))

    def create(target: str, *more: str) -> tuple[int, str]:
        arguments = ["bundle", "create", target, "--config", "keys/models.yaml", *more]
        result = CliRunner().invoke(cli.app, arguments)
        return result.exit_code, f"{result.stderr} {result.exception}"

    code, said = create("made")
    assert code == 0, said
    public = (tmp_path / "keys" / "mine.pub").read_text()
    assert (tmp_path / "made" / "receipts-key.pem").read_text() == public
    assert "receipts-key.pem" in (tmp_path / "made" / "README.txt").read_text()
    assert not list((tmp_path / "made").glob("**/mine*"))
    (tmp_path / "other.pub").write_text(PUBLIC)
    assert create("named", "--key", "other.pub")[0] == 0
    assert (tmp_path / "named" / "receipts-key.pem").read_text() == PUBLIC
    (tmp_path / "keys" / "mine").unlink()
    code, said = create("without")
    assert (code, "cannot read" in said) == (1, True)
    assert not (tmp_path / "without").exists()


# -- what stops it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ConfigError("no.")])
def test_what_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(target: Path, build: str) -> None:
        assert not list(tmp_path.glob("made")), "the name is given at the end"
        raise error

    monkeypatch.setattr(server.bundle.create, "collect_wheels", fail)
    with pytest.raises((KeyboardInterrupt, ConfigError), match=r"^$|No space left|no\."):
        make(tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_what_was_killed_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cleared away after a SIGKILL: what is left does not pass, and is not written over."""
    monkeypatch.setattr(server.bundle.create, "write_checksums", lambda root: os.kill(os.getpid(), 9))
    pid = os.fork()
    if pid == 0:
        make(tmp_path / "made")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["made.partial"]
    assert list(check_bundle(tmp_path / "made.partial"))
    with pytest.raises(ConfigError, match=r"made\.partial exists: another run is writing there, or one was killed"):
        make(tmp_path / "made")


def test_a_place_that_is_taken(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        make(made)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        make(tmp_path / "link")
    with pytest.raises(ConfigError, match=r"cannot make .*: No such file"):
        make(tmp_path / "no" / "made")
    assert not list(check_bundle(made))


# -- the command -----------------------------------------------------------------------------------------------------


def test_which_models_are_packed(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def packed(*arguments: str) -> list[str] | str:
        shutil.rmtree("out", ignore_errors=True)
        result = CliRunner().invoke(cli.app, ["bundle", "create", "out", *arguments])
        if isinstance(result.exception, ConfigError):
            return result.exception.message
        assert result.exit_code == 0, result.exception
        return [entry["id"] for entry in yaml.safe_load(Path("out/models.yaml").read_text())["models"]]

    assert "there is no models.yaml" in packed()
    assert packed("--model", "demo") == ["demo"]
    entries = [{"id": "one", "path": str(tiny("qwen3"))}, {"id": "two", "builtin": "noise"}]
    Path("models.yaml").write_text(yaml.safe_dump({"models": entries, "server": {"port": 1}}))
    assert packed() == ["one", "two"]
    assert "server" not in yaml.safe_load(Path("out/models.yaml").read_text())
    assert packed("-m", "two", "-m", str(tiny("llama"))) == ["two", "llama"]
    assert "the id 'two' is there twice" in packed("-m", "two", "-m", "two")
    assert "there is no folder three" in packed("-m", "three")
    assert "must be cpu or cu130" in packed("--torch", "rocm")


def test_the_software_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration is needed, and what one names is not packed; nothing speaks of models that are not there."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Exception | None:
        return CliRunner().invoke(cli.app, ["bundle", "create", "out", "--no-models", *arguments]).exception  # type: ignore[return-value]

    assert "--model names demo" in str(run("--model", "demo"))
    assert not Path("out").exists()
    Path("models.yaml").write_text(yaml.safe_dump({"models": [{"id": "two", "builtin": "noise"}]}))
    assert run() is None
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "README.txt", FILE, "install.sh", "requirements.txt", "wheels",
    ]  # fmt: skip
    assert not list(check_bundle(Path("out")))
    texts = Path("out/README.txt").read_text() + Path("out/install.sh").read_text()
    assert "THIS_FOLDER/models.yaml" not in texts
    assert "$here/models.yaml" not in texts
    assert subprocess.run(["sh", "-n", "out/install.sh"], check=False).returncode == 0
    Path("out/install.sh").unlink()
    assert "install.sh is missing." in list(check_bundle(Path("out")))

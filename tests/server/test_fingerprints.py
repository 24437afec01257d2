"""`verbatim fingerprint`: parts on lines or as JSON, and two files compared, whatever is in them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from asgi import call
from fakes import INFO, FakeEngine, make_app
from typer.testing import CliRunner, Result

from engine import ModelInfo, fingerprint_of
from server import cli, fingerprints
from server.commands import opening

PARTS: dict[str, Any] = {"torch": "2.13.0", "transformers": "5.24.0", "threads": None, "weights": "sha256:" + "ab" * 32}
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "stop": "[]"}


def info(parts: dict[str, Any] = PARTS, defaults: dict[str, Any] = DEFAULTS, **fields: Any) -> ModelInfo:
    return dataclasses.replace(
        INFO,
        system_fingerprint=fingerprint_of(parts, "vb-"),
        fingerprint_parts=parts,
        defaults_fingerprint=fingerprint_of(defaults, "vd-"),
        default_parts=defaults,
        **fields,
    )


def write(path: Path, *models: ModelInfo) -> Path:
    path.write_text(fingerprints.as_json(models), encoding="utf-8")
    return path


def invoke(*arguments: str | Path) -> Result:
    runner = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
    return runner.invoke(cli.app, ["fingerprint", *map(str, arguments)])


def test_one_fingerprint_is_the_same_as_itself(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", info()), write(tmp_path / "b", info(id="another name"))
    done = invoke(one, other)
    assert (done.exit_code, done.stdout) == (0, "The fingerprints are the same.\n")


def test_what_differs_is_told_part_by_part(tmp_path: Path) -> None:
    changed = {key: value for key, value in PARTS.items() if key != "threads"} | {"transformers": "5.23.0"}
    one, other = write(tmp_path / "a", info(changed)), write(tmp_path / "b", info(defaults={**DEFAULTS, "n": 2}))
    done = invoke(one, other)
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "only in the second: threads null",
        "transformers 5.23.0 → 5.24.0",
        "defaults: only in the second: n 2",
    ]


def test_models_are_compared_by_id(tmp_path: Path) -> None:
    one = write(tmp_path / "a", info(id="x"), info(id="y"), info(id="gone"))
    other = write(tmp_path / "b", info({**PARTS, "torch": "2.12.0"}, id="y"), info(id="x"), info(id="new"))
    done = invoke(one, other)
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "only in the first: the model gone",
        "only in the second: the model new",
        "y: torch 2.13.0 → 2.12.0",
    ]


def test_what_a_server_answers_can_be_compared(tmp_path: Path) -> None:
    """The object of one model has the parts; the list, which clients ask for often, has not."""
    app = make_app(FakeEngine(info=info()))
    answer = call(app, path="/v1/models/fake")
    (tmp_path / "a").write_bytes(json.dumps(answer.json).encode())
    assert invoke(tmp_path / "a", write(tmp_path / "b", info())).exit_code == 0
    [listed] = call(app, path="/v1/models").json["data"]
    assert not {"fingerprint_parts", "default_parts"} & listed.keys()
    for model in (listed, answer.json):
        assert model["max_model_len"] == model["context_length"] == INFO.context_length
        assert model["defaults_fingerprint"] == fingerprint_of(DEFAULTS, "vd-")
    (tmp_path / "c").write_text(json.dumps({"data": [listed]}))
    assert invoke(tmp_path / "c", tmp_path / "a").exit_code == 2


def _edited(**changes: Any) -> str:
    return json.dumps({**json.loads(fingerprints.as_json([info()])), **changes})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON that can be read: "),
        ("{", "is not JSON that can be read: "),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 90 + "]" * 90, "holds no fingerprint_parts"),
        ("9" * 5000, "an integer of thousands of digits"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("[" + "0," * 300_000 + "0]", "more than 200000 values"),
        (b"\xff\xfe", "is not UTF-8"),
        ("[]", "holds no fingerprint_parts"),
        ("7", "holds no fingerprint_parts"),
        ('{"data": [1]}', "holds no fingerprint_parts"),
        (_edited(fingerprint_parts=[1]), "holds no fingerprint_parts"),
        (_edited(default_parts=None), "holds no fingerprint_parts"),
        (_edited(fingerprint_parts={"a": {"b": 1}}), "a part is a text, a number or null"),
        (_edited(fingerprint_parts={str(i): 1 for i in range(1001)}), "no fingerprint has more than 1000"),
        (_edited(fingerprint_parts={**PARTS, "torch": "9"}), "of another fingerprint than the system_fingerprint"),
        (_edited(default_parts={"n": 3}), "of another fingerprint than the defaults_fingerprint"),
        (_edited(fingerprint_parts={"a": 2**60}), "of another fingerprint"),
        (_edited(fingerprint_parts={"a": float("nan")}), "NaN is not a JSON number"),
        (_edited(fingerprint_parts={"\ud800": "\udfff"}), "half a surrogate pair"),
        (json.dumps({"data": [json.loads(_edited(id="\x1b[31m"))] * 2}), "several models of one id"),
    ],
    ids=range(21),
)
def test_a_strangers_file_is_one_sentence(content: str | bytes, words: str, tmp_path: Path) -> None:
    path, good = tmp_path / "bad", write(tmp_path / "good", info())
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for files in ((path, good), (good, path)):
        done = invoke(*files)
        assert (done.exit_code, done.stdout) == (2, "")
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.strip().isprintable()


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 30)
    done = invoke(tmp_path / "huge", tmp_path / "huge")
    assert (done.exit_code, done.stderr) == (2, f"{tmp_path / 'huge'} has more than 4 MiB; no fingerprint has.\n")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "is no regular file"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "none", "cannot be read: No such file or directory"),
        (Path("/dev/zero"), "is no regular file"),
    ):
        done = invoke(path, path)
        assert (done.exit_code, words in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    "arguments", [["a"], ["a", "b", "c"], ["a", "b", "--model", "x"], ["a", "b", "--config", "x"], ["a", "b", "--json"]]
)
def test_files_go_with_nothing_else(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "give two files and no option" in done.stderr


def test_a_comparison_loads_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "a", info())
    code = (
        "import sys; from typer.testing import CliRunner; from server.cli import app; "
        f"assert CliRunner().invoke(app, ['fingerprint', {str(path)!r}, {str(path)!r}]).exit_code == 0; "
        "print(sorted({'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_parts_are_printed_one_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Loaded:
        def __init__(self, entry: Any) -> None:
            self.info = info({**PARTS, "cpu": "a\x1bb"}, id=entry.id)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "load", lambda entry, *_: Loaded(entry))
    monkeypatch.setattr(opening, "before_anything_heavy", lambda pull: None)
    (tmp_path / "models.yaml").write_text("models:\n  - {id: a, builtin: demo}\n  - {id: b, builtin: noise}\n")
    done = invoke()
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["a", "b"]
    assert lines.count("    transformers  5.24.0") == lines.count("    threads       null") == 2
    assert lines.count(f"  defaults {fingerprint_of(DEFAULTS, 'vd-')}") == 2
    assert "    cpu           a\\x1bb" in lines
    done = invoke("--json")
    (tmp_path / "both.json").write_text(done.stdout)
    assert [model["id"] for model in json.loads(done.stdout)["data"]] == ["a", "b"]
    assert invoke("both.json", "both.json").exit_code == 0

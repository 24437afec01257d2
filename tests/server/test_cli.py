"""The command line: what a newcomer reads, and errors in one line that say what to do next."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import INFO
from typer.testing import CliRunner

import server.run
from engine import ChoiceDelta, GpuReport, LoadError, ReproducibilityReport, RequestOutput, Usage
from server import cli
from server.commands import early, opening
from server.commands.greeting import example_request
from server.hosts import PORT
from server.lifecycle import early_load
from server.settings import ServerSettings
from server.wire.listener import bind


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in an empty folder, and leaves the environment as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    # The default port may be taken on the machine that runs the tests.
    monkeypatch.setattr(early, "bind", lambda host, port: bind(host, 0 if port == PORT else port))
    return tmp_path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `serve` would have run."""
    calls: list[dict[str, Any]] = []

    @contextmanager
    def loading(entries: Any, settings: ServerSettings, *, pull: bool, **rest: Any) -> Iterator[tuple[None, None]]:
        calls.append({"entries": entries, "settings": settings, "pull": pull, "offline": os.getenv("HF_HUB_OFFLINE")})
        yield None, None

    def run(registry: None, display: None, settings: ServerSettings, *, ledger: Any, receipts: Any, **_: Any) -> None:
        receipts.close()
        calls[-1]["ledger"] = ledger

    monkeypatch.setattr(early_load, "loading", loading)
    monkeypatch.setattr(server.run, "run", run)
    return calls


def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """The console command, in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["verbatim", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(caught.value.code or 0), captured.out, re.sub(r"\s+", " ", captured.err)


class FakeLLM:
    """Says two words, or cannot be loaded."""

    info = INFO
    asked: list[tuple[Any, dict[str, Any]]]

    def __init__(self) -> None:
        self.asked = []

    def add(self, prompt: Any, **sampling: Any) -> Any:
        self.asked.append((prompt, sampling))
        return SimpleNamespace(request_id="r", params=SimpleNamespace(seed=sampling.get("seed", 5)))

    def outputs(self, request_id: str) -> Iterable[RequestOutput]:
        for i, word in enumerate(("Hello", " [bold]wörld")):
            yield RequestOutput("r", (ChoiceDelta(0, word, (i,)),), Usage(1, i + 1), i == 1)


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["serve", "models", "generate", "reproduced"]),
        (["serve", "--help"], ["--config", "--host", "--port", "--model", "--name", "--pull", "127.0.0.1", "8000"]),
        (["models", "check", "--help"], ["--config", "self-test"]),
        (["generate", "--help"], ["--seed", "--temperature", "--max-tokens", "--system", "--stop"]),
    ],
    ids=lambda v: " ".join(v[:2]),
)
def test_help_names_what_there_is(arguments: list[str], words: list[str]) -> None:
    result = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, arguments)
    assert result.exit_code == 0
    for word in words:
        assert word in re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_help_does_not_wait_for_torch() -> None:
    """`--help` answers at once only if nothing heavy is imported on the way to it."""
    code = (
        "import sys; from typer.testing import CliRunner; from server.cli import app; "
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0; "
        "print(sorted({'torch', 'transformers', 'fastapi', 'uvicorn', 'numpy'} & set(sys.modules)))"
    )
    root = Path(server.run.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# -- what is served --------------------------------------------------------------------------------------------------


def test_a_configuration_is_read_and_options_win(elsewhere: Path, served: list[dict[str, Any]]) -> None:
    (elsewhere / "my.yaml").write_text(
        "models:\n  - {id: a, path: weights, max_queue: 3}\nserver: {port: 9000, strict_params: true}\n"
    )
    assert CliRunner().invoke(cli.app, ["serve", "--config", "my.yaml", "--port", "9001"]).exit_code == 0
    [call] = served
    assert [(e.id, e.path, e.max_queue) for e in call["entries"]] == [("a", elsewhere / "weights", 3)]
    assert (call["settings"].port, call["settings"].strict_params) == (9001, True)
    assert (call["pull"], call["offline"]) == (False, "1")


def test_models_yaml_is_found_by_itself(elsewhere: Path, served: list[dict[str, Any]]) -> None:
    (elsewhere / "models.yaml").write_text("models:\n  - {id: here, builtin: noise}\n")
    assert CliRunner().invoke(cli.app, ["serve"]).exit_code == 0
    assert served[0]["entries"][0].id == "here"


def test_without_anything_it_serves_the_demo_model_and_says_so(served: list[dict[str, Any]]) -> None:
    result = CliRunner().invoke(cli.app, ["serve"])
    assert result.exit_code == 0
    assert "the demo model" in result.stderr
    assert served[0]["entries"][0].builtin == "demo"
    assert served[0]["settings"].host == "127.0.0.1"


def test_a_folder_is_served_without_any_file(elsewhere: Path, served: list[dict[str, Any]]) -> None:
    (elsewhere / "Qwen3-0.6B").mkdir()
    runner = CliRunner()
    assert runner.invoke(cli.app, ["serve", "--model", "Qwen3-0.6B"]).exit_code == 0
    assert runner.invoke(cli.app, ["serve", "--model", "Qwen3-0.6B", "--name", "q"]).exit_code == 0
    assert runner.invoke(cli.app, ["serve", "--model", "Qwen/Qwen3-0.6B", "--pull"]).exit_code == 0
    folder, named, hub = (call["entries"][0] for call in served)
    assert (folder.id, folder.path) == ("Qwen3-0.6B", elsewhere / "Qwen3-0.6B")
    assert named.id == "q"
    assert (hub.id, hub.repo, hub.path) == ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None)


def test_a_gguf_file_is_served_by_its_stem(elsewhere: Path, served: list[dict[str, Any]]) -> None:
    (elsewhere / "Qwen3-0.6B-Q8_0.gguf").write_bytes(b"GGUF")
    assert CliRunner().invoke(cli.app, ["serve", "--model", "Qwen3-0.6B-Q8_0.gguf"]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["serve", "--model", "./Qwen3-0.6B-Q8_0.gguf", "--name", "q"]).exit_code == 0
    entries = [call["entries"][0] for call in served]
    assert [entry.id for entry in entries] == ["Qwen3-0.6B-Q8_0", "q"]
    assert {entry.path for entry in entries} == {(elsewhere / "Qwen3-0.6B-Q8_0.gguf").resolve()}


def test_downloads_are_off_unless_asked_for(served: list[dict[str, Any]]) -> None:
    assert CliRunner().invoke(cli.app, ["serve", "--pull"]).exit_code == 0
    assert (served[0]["pull"], served[0]["offline"]) == (True, None)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "file", "words"),
    [
        (["serve", "--config", "no.yaml"], None, ["no.yaml does not exist", "--model DIR"]),
        (["serve", "--model", "./nowhere"], None, ["no folder ./nowhere", "Qwen/Qwen3-0.6B"]),
        (["serve", "--model", "models/nowhere.gguf"], None, ["no folder models/nowhere.gguf, no such GGUF file"]),
        (["serve", "--model", "a", "--config", "b"], None, ["b does not exist"]),
        (["serve", "--name", "x"], None, ["--name goes with --model"]),
        (["serve"], "models: []", ["models.yaml", "at least one entry"]),
        (["serve"], "models:\n  - {id: a, pth: b}", ["models[0]", "unknown key 'pth'", "did you mean 'path'"]),
        (["serve"], "models: [a\n", ["models.yaml is not valid YAML"]),
        (["serve"], "models:\n  - {id: a, path: b}\nserver: {hst: x}", ["'hst'", "did you mean 'host'"]),
        (["models", "check", "--config", "no.yaml"], None, ["no.yaml does not exist"]),
        (["generate", "hi", "--model", "./nowhere"], None, ["no folder ./nowhere"]),
        (["serve", "--model", "./a[/b]"], None, ["no folder ./a[/b]"]),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_errors_are_one_line_and_exit_code_one(
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    file: str | None,
    words: list[str],
) -> None:
    if file is not None:
        (elsewhere / "models.yaml").write_text(file)
    code, out, err = main(capsys, monkeypatch, *arguments)
    assert (code, out) == (1, "")
    assert re.sub(r"^verbatim .* · open it in a browser ", "", err.strip()).startswith("error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["serve", "--port", "70000"], "65535"), (["nonsense"], "nonsense"), (["serve", "--prt", "1"], "--prt")],
)
def test_wrong_usage_is_exit_code_two(arguments: list[str], word: str) -> None:
    result = CliRunner(env={"NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert word in result.stderr


def test_a_taken_port_is_told_before_any_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = main(capsys, monkeypatch, "serve", "--port", str(port))
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in err
    assert "--port" in err


def test_an_address_that_is_not_ours_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = main(capsys, monkeypatch, "serve", "--host", "host.invalid", "--port", "0")
    assert code == 1
    assert "host.invalid" in err


def test_the_listener_is_on_loopback() -> None:
    listener = bind("127.0.0.1", 0)
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_example_request_survives_a_shell() -> None:
    import json

    words = shlex.split(example_request("http://127.0.0.1:8000", "my model"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "my model"


# -- models check, generate ------------------------------------------------------------------------------------------


def test_check_prints_what_it_found_and_fails_if_one_does(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "models.yaml").write_text("models:\n  - {id: good, builtin: noise}\n  - {id: bad, path: gone}\n")

    class Broken(FakeLLM):
        info = INFO.__class__(
            **{
                **{name: getattr(INFO, name) for name in INFO.__slots__},
                "law": ReproducibilityReport(False, "experts [differ]."),
                "memory": "24.0 GiB: weights 15.3, free 8.7",
            }
        )

    def opened(entry: Any, pull: bool, progress: Any) -> FakeLLM:
        progress("reading [1/2]")
        if entry.id == "bad":
            raise LoadError("gone: no config.json [checked]")
        return Broken()

    monkeypatch.setattr(opening, "load", opened)
    result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["models", "check"])
    assert result.exit_code == 1
    assert "error: bad: gone: no config.json [checked]" in result.stderr
    for word in ("FakeForCausalLM", "packed", "fp_fake", "no: experts [differ].", "24.0 GiB: weights"):
        assert word in result.stdout
    (elsewhere / "models.yaml").write_text("models:\n  - {id: good, builtin: noise}\n")
    assert CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["models", "check"]).exit_code == 0


def test_check_says_how_a_gpu_computes_a_model(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "models.yaml").write_text("models:\n  - {id: good, builtin: noise}\n")
    report = GpuReport("torch", (("graphs", "linear: [wrong]"), ("kernels", "linear: [wrong]")))

    class OnGpu(FakeLLM):
        info = dataclasses.replace(INFO, gpu=report)

    monkeypatch.setattr(opening, "load", lambda entry, pull, progress: OnGpu())
    result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["models", "check"])
    assert "torch (not graphs, kernels: linear: [wrong])" in result.stdout
    monkeypatch.setattr(opening, "load", lambda entry, pull, progress: FakeLLM())
    assert "gpu" not in CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["models", "check"]).stdout


def test_generate_streams_to_stdout_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    monkeypatch.setattr(opening, "load", lambda entry, pull, progress: llm)
    arguments = ["generate", "hi", "--seed", "7", "--temperature", "0", "--stop", "x", "--system", "be brief"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert result.stdout == "Hello [bold]wörld\n"
    assert "seed 7 · fp_fake" in result.stderr, "what the same text can be had with"
    [(messages, sampling)] = llm.asked
    assert [(m.role, m.content) for m in messages] == [("system", "be brief"), ("user", "hi")]
    assert sampling == {"seed": 7, "temperature": 0, "stop": ["x"], "max_tokens": 256}


def test_generate_raw_continues_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    monkeypatch.setattr(opening, "load", lambda entry, pull, progress: llm)
    assert CliRunner().invoke(cli.app, ["generate", "Once upon", "--raw"]).exit_code == 0
    assert llm.asked[0] == ("Once upon", {"max_tokens": 256})

"""The output of a batch: one run at a time, never torn, resumed where it ends, refused where it is something else's."""

from __future__ import annotations

import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from batch_lines import answered, line, many, write
from typer.testing import CliRunner

import server.batch.run
from engine import ConfigError, Registry
from server import cli
from server.batch.output import OutputFile

RUN = [sys.executable, "-c", "from server.cli import main; main()", "batch"]


@pytest.fixture
def run(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """`verbatim batch in.jsonl out.jsonl …` in this process, on the loaded model: exit code and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    (tmp_path / "models.yaml").write_text("models: [{id: tiny, builtin: noise}]\n")

    def loaded(entries: Any, pull: bool, console: Any) -> Registry:
        monkeypatch.setattr(registry, "close", lambda: True)
        return registry

    monkeypatch.setattr(server.batch.run, "_loaded", loaded)

    def command(*arguments: str) -> tuple[int, str]:
        paths = [] if arguments and arguments[0].endswith(".jsonl") else ["in.jsonl", "out.jsonl"]
        result = CliRunner().invoke(cli.app, ["batch", *paths, *arguments, "--concurrency", "4"])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, re.sub(r"\s+", " ", result.stderr)

    return command


Run = Callable[..., tuple[int, str]]


def test_a_run_its_exit_code_and_a_second_run(registry: Registry, run: Run, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", many(6)), tmp_path / "out.jsonl"
    assert run() == (0, "6 lines: out.jsonl ")
    assert target.read_bytes() == b"".join(answered(source, registry, 1))
    before = target.stat()
    assert run() == (0, "out.jsonl was complete already: 6 lines. ")
    assert target.stat().st_mtime_ns == before.st_mtime_ns
    write(source, [*many(6), line("bad", temperature=9)])
    assert run() == (1, "7 lines, 1 of them failed (6 were there already): out.jsonl ")
    assert run() == (1, "out.jsonl was complete already: 7 lines, 1 of them failed. ")


@pytest.mark.parametrize("cut", [0, 1, 2.5, 5, 5.999])
def test_a_torn_output_is_resumed(registry: Registry, run: Run, tmp_path: Path, cut: float) -> None:
    """`cut`: whole lines that are left, and how much of the next one."""
    source, target = write(tmp_path / "in.jsonl", many(6)), tmp_path / "out.jsonl"
    lines = answered(source, registry, 4)
    whole, part = int(cut), cut - int(cut)
    target.write_bytes(b"".join(lines[:whole]) + (lines[whole][: int(len(lines[whole]) * part)]))
    assert run()[0] == 0
    assert target.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[1:], "answers 'row 0', where in.jsonl has 'row 1': it belongs to another input"),
        (lambda lines: lines[:2], "has more lines than in.jsonl"),
        (lambda lines: [line("row 0", "Other"), *lines[1:]], "line 1 of out.jsonl answers another request"),
    ],
)
def test_the_output_of_another_input_is_refused(
    registry: Registry, run: Run, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    lines = many(4)
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run()[0] == 0
    before = target.read_bytes()
    target.write_bytes(before + b"torn")
    write(source, change(lines))
    code, said = run()
    assert code == 2
    assert words in said
    assert "--overwrite" in said
    assert target.read_bytes() == before + b"torn", "nothing is cut off what is refused"
    assert run("--overwrite")[0] == 0
    assert target.read_bytes() == b"".join(answered(source, registry, 1))


def test_the_output_of_another_fingerprint_or_other_options_is_refused(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", many(3))
    target = tmp_path / "out.jsonl"
    assert run()[0] == 0
    assert "answers another request, or is of a model with another fingerprint" in run("--receipts")[1]
    target.write_text(re.sub(r'"batch_req_\w', '"batch_req_x', target.read_text()))
    assert run()[0] == 2
    for text in ("[]\n", "{}\n", "prose\n", '{"id": 1, "custom_id": 2, "response": 3}\n'):
        target.write_text(text)
        code, said = run()
        assert code == 2
        assert "line 1 of out.jsonl is not a batch's output" in said
        assert target.read_text() == text


def test_what_cannot_be_read_or_written_is_said(run: Run, tmp_path: Path) -> None:
    assert run() == (2, "error: cannot read in.jsonl: No such file or directory. ")
    write(tmp_path / "in.jsonl", many(1))
    assert run("in.jsonl", "no/out.jsonl")[1] == "error: cannot write no/out.jsonl: No such file or directory. "
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    assert "are one file" in run("in.jsonl", "link.jsonl", "--overwrite")[1]
    assert (tmp_path / "in.jsonl").stat().st_size
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    assert "is no regular file" in run("in.jsonl", "full.jsonl")[1]
    with OutputFile(tmp_path / "out.jsonl"):
        assert run() == (2, "error: out.jsonl is being written by another run. ")
    assert run()[0] == 0


def test_a_full_disk_leaves_whole_lines(registry: Registry, run: Run, tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk: writing fails in the middle of a line."""
    source, target = write(tmp_path / "in.jsonl", many(8)), tmp_path / "out.jsonl"
    lines = answered(source, registry, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(map(len, lines[:3])) + 100, hard))
    try:
        code, said = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert said == "stopped: cannot write out.jsonl: File too large. The same command goes on behind the last line. "
    assert target.read_bytes() == b"".join(lines[:3])
    assert run()[0] == 0
    assert target.read_bytes() == b"".join(lines)


def test_a_line_is_cut_off_whole_when_it_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b'{"id":"a","custom_id":"x","response":null}\nto')
    with OutputFile(tmp_path / "out") as file:
        assert file.resume(lambda number, written: None) == 1
        file.append(b"next\n")
    with pytest.raises(ConfigError, match="line 2 of"), OutputFile(tmp_path / "out") as file:
        file.resume(lambda number, written: None)
    assert (tmp_path / "out").read_bytes().endswith(b"}\nnext\n")


def _interruptible() -> None:
    """Let SIGINT end a new process: a shell that runs the tests in the background has it ignored, in children too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _process(folder: Path, target: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, "in.jsonl", target], cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=_interruptible
    )


@pytest.fixture(scope="module")
def undisturbed(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a batch that a process has completed: `models.yaml`, `in.jsonl` and `whole.jsonl`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    entry: dict[str, Any] = {"id": "tiny", "path": str(tiny("qwen3")), "cache_size": "8MiB", "threads": 1}
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": [entry]}))
    write(folder / "in.jsonl", [line(i, max_tokens=100) for i in map(str, range(300))])
    assert "300 lines: whole.jsonl" in _process(folder, "whole.jsonl").communicate(timeout=200)[1]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    how: signal.Signals, tiny: Callable[[str], Path], undisturbed: Path, tmp_path: Path
) -> None:
    """Real processes: one that was not disturbed, one that is ended in the middle, and one that goes on."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    target = tmp_path / "out.jsonl"
    first = _process(tmp_path, "out.jsonl")
    deadline = time.monotonic() + 100
    while not (target.exists() and target.stat().st_size > 20_000):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # so that it is still in the middle when the others have had their turn
    rival = CliRunner().invoke(
        cli.app, ["batch", str(tmp_path / "in.jsonl"), str(target), "--model", str(tiny("qwen3"))]
    )
    assert (rival.exit_code, "another run" in re.sub(r"\s+", " ", rival.stderr)) == (2, True)
    first.send_signal(how)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=100)
    assert first.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), said
    left = target.read_bytes()
    assert (tmp_path / "whole.jsonl").read_bytes().startswith(left)
    assert len(left) < (tmp_path / "whole.jsonl").stat().st_size
    _, said = _process(tmp_path, "out.jsonl").communicate(timeout=200)
    assert re.search(r"300 lines \(\d+ were there already\)", said), said
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

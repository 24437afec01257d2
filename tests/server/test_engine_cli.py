"""The commands on a real tiny checkpoint: what is printed is what was found, and the same seed says the same again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server import cli
from server.commands import opening

Printed = tuple[int, str, str]

pytestmark = pytest.mark.slow


@pytest.fixture
def verbatim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Printed]:
    """The console command, run in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> Printed:
        monkeypatch.setattr(sys, "argv", ["verbatim", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(caught.value.code or 0), captured.out, re.sub(r"\s+", " ", captured.err)

    return run


def test_generate_says_the_same_for_the_same_seed(
    verbatim: Callable[..., Printed], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Twice here and once in a new process: the same words on stdout and nothing else; another seed, other words."""
    file = tmp_path / "models.yaml"
    file.write_text(f"models:\n  - {{id: a, path: {tiny('qwen3')}, cache_size: 8MiB, threads: 1}}\n")
    arguments = ["generate", "--max-tokens", "24", "Say something", "--seed"]
    (code, first, _), (_, again, _), (_, other, _) = (verbatim(*arguments, seed) for seed in ("7", "7", "8"))
    assert code == 0
    assert len(first) > 5
    assert first == again != other
    root = Path(cli.__file__).parents[1]
    new = subprocess.run(
        [sys.executable, "-c", "from server.cli import main; main()", *arguments, "7"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        timeout=120,
    )
    assert new.stdout.decode() == first, new.stderr.decode()
    assert list(tmp_path.iterdir()) == [file], "a first look leaves nothing behind"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "3"], "temperature must be between 0 and 2, not 3.0"),
        (["--top-p", "nan"], "top_p must be between 0 and 1, not nan"),
        (["--seed", str(2**63)], "seed must be between"),
        (["--stop", ""], "empty string"),
        (["--max-tokens=-2"], "max_tokens must be at least 0, not -2"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_generate_refuses_what_the_endpoint_refuses_and_loads_nothing_first(
    verbatim: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(opening, "load", None)
    code, out, err = verbatim("generate", *arguments, "Hi")
    assert (code, out) == (1, "")
    assert words in err


def test_a_prompt_over_the_context_is_told_with_both_numbers(
    verbatim: Callable[..., Printed], tiny: Callable[[str], Path]
) -> None:
    code, out, err = verbatim("generate", "--model", str(tiny("qwen3")), "7" * 3000)
    assert (code, out) == (1, "")
    assert re.search(r"the prompt has 30\d\d tokens; this model's context holds 2048", err)


def test_check_prints_the_fingerprint_and_fails_with_one_entry(
    verbatim: Callable[..., Printed], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """It is the command that a deployment runs first: its table is for people, its exit code for scripts."""
    good = "{{id: '{}', path: {}, cache_size: 8MiB, threads: 1}}".format("[good]", tiny("qwen3"))
    bad = f"{{id: broken, path: {tmp_path / 'gone'}}}"
    (tmp_path / "good.yaml").write_text(f"models:\n  - {good}\n")
    (tmp_path / "both.yaml").write_text(f"models:\n  - {bad}\n  - {good}\n")
    code, out, _ = verbatim("models", "check", "--config", "good.yaml")
    assert code == 0
    [fingerprint] = re.findall(r"vb-[0-9a-f]{16}", out)
    for word in ("[good]", "Qwen3ForCausalLM", "packed", "float32", "cpu"):
        assert word in out
    code, out, err = verbatim("models", "check", "--config", "both.yaml")
    assert code == 1
    assert fingerprint in out, "the one that loads is still checked, with the same result"
    assert "broken: " in err
    assert "gone" in err

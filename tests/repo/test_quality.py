"""What rounding costs is measured against the right float32: the same tokens and positions for us and llama.cpp."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import llama_quality, quality
from tests import tiny_models
from tests.engine import gguf_files


def read_base(path: Path) -> tuple[list[list[int]], torch.Tensor]:
    """Read a base file as llama.cpp does: windows of tokens, log-probabilities `[positions, vocab] float64`."""
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    length, vocab, count = struct.unpack_from("<Iii", data, 8)
    tokens = struct.unpack_from(f"<{length * count}i", data, 20)
    width = 2 * ((vocab + 1) // 2)
    at, rows = 20 + 4 * length * count, []
    for _ in range(count * (length - 1 - length // 2)):
        step, lowest = struct.unpack_from("<ff", data, at)
        numbers = struct.unpack_from(f"<{width}H", data, at + 8)[:vocab]
        rows.append(torch.tensor(numbers, dtype=torch.float64) * step + lowest)
        at += 8 + 2 * width
    assert at == len(data)
    return [list(tokens[i * length : (i + 1) * length]) for i in range(count)], torch.stack(rows)


@pytest.mark.parametrize("vocab", [6, 7])
def test_a_base_file_holds_tokens_and_log_probabilities(tmp_path: Path, vocab: int) -> None:
    """A row that is shifted, or whose sum is not one, would be a divergence of our own making."""
    windows = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, vocab, generator=generator, dtype=torch.float32) * 3
    logits[1, 0], logits[2] = -90.0, 2.0  # far below, and all alike
    llama_quality.write_base(tmp_path / "base", windows, logits.split(3))
    tokens, found = read_base(tmp_path / "base")
    assert tokens == windows
    expected = logits.double().log_softmax(-1)
    floor = expected.amax(-1, keepdim=True) - 16
    torch.testing.assert_close(found, torch.maximum(expected, floor), atol=16 / 65535, rtol=0)


def test_what_llama_cpp_says_is_read_or_missed() -> None:
    said = """
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence
   1       9.1234 ±    1.2345       0.01234 ±    0.00123       0.00500 ±    0.00010

====== Perplexity statistics ======
Mean PPL(Q)                   :   8.123456 ±   0.345678
Mean PPL(base)                :   8.100000 ±   0.345678

====== KL divergence statistics ======
Mean    KLD:   0.005432 ±   0.000123
Maximum KLD:   0.412345
99.9%   KLD:   0.200000
99.0%   KLD:   0.050000
Median  KLD:   0.002100
10.0%   KLD:   0.000100
 1.0%   KLD:   0.000002
 0.1%   KLD:  -0.000001

====== Token probability statistics ======
Same top p: 95.500 ± 0.250 %
"""
    assert llama_quality.read_output(said) == {
        "mean": 0.005432,
        "median": 0.0021,
        "low": 0.000002,
        "high": 0.05,
        "same": 0.955,
        "perplexity": 8.123456,
    }
    with pytest.raises(RuntimeError, match="did not say its same: "):
        llama_quality.read_output(said[: said.index("Same top")])


STAND_IN = """#!{python}
import math, pathlib, sys
sys.path.insert(0, {root!r})
from tests.repo.test_quality import read_base
given = dict(zip(sys.argv, sys.argv[1:]))
assert pathlib.Path(given["-m"]).is_file() and "--kl-divergence" in sys.argv
windows, rows = read_base(pathlib.Path(given["--kl-divergence-base"]))
truth = [token for window in windows for token in window[len(window) // 2 + 1 :]]
surprise = -sum(float(row[token]) for row, token in zip(rows, truth, strict=True)) / len(truth)
print("Mean PPL(Q) : ", math.exp(surprise))
print("Mean KLD: 0.5\\nMedian KLD: 0.25\\n99.0% KLD: 0.75\\n1.0% KLD: 0.125\\nSame top p: 50.0")
"""


@pytest.mark.slow
def test_a_file_beside_llama_cpp_on_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of the same float32 weights diverges by nothing; the program finds our float32's perplexity.

    The program is a stand-in, so that nothing need be installed; it reads what llama.cpp's would.
    """
    folder = tiny_models.write(tmp_path / "llama", "llama")
    file = gguf_files.write(folder, tmp_path / "llama.gguf")
    program, text = tmp_path / "llama-perplexity", tmp_path / "text"
    program.write_text(STAND_IN.format(python=sys.executable, root=str(Path(__file__).parents[2])), encoding="utf-8")
    program.chmod(0o755)
    text.write_text(" ".join(f"{i * i} of {i} things, and so on." for i in range(200)), encoding="utf-8")
    command = ["--model", str(folder), "--quantization", "int8", "--gguf", str(file), "--text", str(text)]
    quality.main(
        [*command, "--llama-perplexity", str(program), "--threads", "1", "--quick", "--out", str(tmp_path / "out")]
    )
    (path,) = (tmp_path / "out").glob("*-quality-llama-*.json")
    assert path.name in capsys.readouterr().out
    rows = {row["name"]: row["values"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    divergence, same, perplexity = (
        {name: value["median"] for name, value in rows[row].items()}
        for row in ("KL divergence from float32", "the likeliest token is the same", "perplexity")
    )
    assert list(divergence) == ["int8", "verbatim F32", "llama.cpp F32"]
    assert divergence["verbatim F32"] < 1e-9
    assert divergence["int8"] > divergence["verbatim F32"]
    assert divergence["llama.cpp F32"] == 0.5
    assert same["verbatim F32"] == 1
    assert same["llama.cpp F32"] == 0.5
    assert perplexity["verbatim F32"] == pytest.approx(perplexity["float32"], rel=1e-6)
    assert perplexity["llama.cpp F32"] == pytest.approx(perplexity["float32"], rel=1e-3)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--quantization"], "there is nothing to compare"),
        (["--llama-perplexity", "p"], "needs --gguf"),
        (["--gguf", "f", "--llama-perplexity", "p"], "texts of one length"),
    ],
)
def test_what_cannot_be_compared_is_refused(command: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.parse(command)
    assert words in capsys.readouterr().err

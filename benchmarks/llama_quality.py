"""llama.cpp's own divergence from our float32: its program `llama-perplexity` on the same tokens. Judges nothing.

The program compares a GGUF file with logits that it finds in a file, which also holds the tokens. Here that file is
written from this engine's float32 logits. Format: `tools/perplexity/perplexity.cpp` of llama.cpp, `log_softmax` and
`kl_divergence`.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_DEEPEST = 16.0
"""Logits further below the largest are written as if they were so far below it; the program takes no part in them."""
_STEPS = 65535.0
_LINES = {
    "mean": r"Mean +KLD: +([\d.e+-]+)",
    "median": r"Median +KLD: +([\d.e+-]+)",
    "low": r"^ *1\.0% +KLD: +([\d.e+-]+)",
    "high": r"^ *99\.0% +KLD: +([\d.e+-]+)",
    "same": r"Same top p: +([\d.]+)",
    "perplexity": r"Mean PPL\(Q\) +: +([\d.e+-]+)",
}
FEWEST = 100
"""The program makes no statistics of fewer positions."""


def write_base(path: Path, windows: Sequence[Sequence[int]], rows: Iterable[Tensor]) -> None:
    """Write tokens and logits for `llama-perplexity --kl-divergence`.

    Args:
        windows: texts of one length, in tokens. The program compares the positions from the middle to the last but one.
        rows: for these positions of all windows in order, logits `[n, vocab] float32`, any number at a time.
    """
    (length,) = {len(window) for window in windows}
    with path.open("wb") as file:
        for number, some in enumerate(rows):
            if number == 0:
                file.write(b"_logits_" + struct.pack("<Iii", length, some.shape[1], len(windows)))
                tokens = [token for window in windows for token in window]
                file.write(struct.pack(f"<{len(tokens)}i", *tokens))
            file.write(_packed(some))


def _packed(logits: Tensor) -> bytes:
    """Return each row as two floats, the step and the least log-probability, and a 16-bit number of steps a token."""
    logits = logits.to(torch.float32)
    largest = logits.amax(-1, keepdim=True)
    least = torch.maximum(logits.amin(-1, keepdim=True), largest - _DEEPEST)
    step = (largest - least) / _STEPS
    lowest = least - logits.double().logsumexp(-1, keepdim=True).to(torch.float32)
    counts = ((logits.clamp(min=least) - least) / step.clamp(min=torch.finfo(torch.float32).tiny)).round()
    width = 2 * ((logits.shape[1] + 1) // 2)
    numbers = torch.zeros(len(logits), width, dtype=torch.int32)
    numbers[:, : logits.shape[1]] = counts.clamp(max=_STEPS).to(torch.int32)
    head = torch.cat([step, lowest], 1).contiguous().view(torch.int32)
    whole = torch.cat([head.view(torch.uint16), numbers.to(torch.uint16)], 1)
    return whole.numpy().tobytes()


def read_output(text: str) -> dict[str, float]:
    """Return what the program found: `mean`, `median`, `low` and `high` (1 and 99 %) of the divergence in nats, the
    share of positions with the `same` likeliest token, and the `perplexity`.

    Raises:
        RuntimeError: a line is missing; with the last words.
    """
    found = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in _LINES.items()}
    if missing := [name for name, match in found.items() if not match]:
        raise RuntimeError(f"llama-perplexity did not say its {', '.join(missing)}: {text[-1000:]}")
    values = {name: float(match[1]) for name, match in found.items() if match}
    return {**values, "same": values["same"] / 100}


def compare(program: Path, file: Path, base: Path, length: int, threads: int) -> dict[str, float]:
    """Let the program compare a GGUF file with the base file; what `read_output` returns.

    Raises:
        RuntimeError: it cannot be started, failed, or took longer than an hour; with its last words.
    """
    command = [program, "-m", file, "--kl-divergence", "--kl-divergence-base", base]
    command += ["-c", str(length), "-b", str(length), "-t", str(threads), "-tb", str(threads)]
    try:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True, text=True, timeout=3600, check=False, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{program.name} did not compare {file.name}: {error}") from None
    if done.returncode:
        raise RuntimeError(f"{program.name} failed with {file.name}: {done.stderr[-1000:]}")
    return read_output(done.stdout + done.stderr)

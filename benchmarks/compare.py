"""Servers side by side over HTTP, in one run on one machine: this one, llama.cpp's, transformers' own, vLLM's.

    python benchmarks/compare.py --model DIR [--int8] [--transformers] [--vllm]
        [--llama-server PROGRAM --gguf F32=FILE --gguf Q8_0=FILE …]

Every server is a process of its own on loopback, with the same number of threads. They are measured one after the
other, every other repetition in reverse order; whoever is not being measured is stopped (SIGSTOP), so that nobody's
spinning threads cost another one anything. Prompts are sent as chat messages, greedy, to the end of `max_tokens`, and
have exactly the given number of tokens by the checkpoint's tokenizer and template; a contestant that counts other
prompt or answer tokens is an error, not a result.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds files that must not hide packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from benchmarks import machine, real_model, served
from benchmarks.common import RESULTS, peak_rss_bytes, ratios, summary
from benchmarks.report import Report

OURS = "verbatim"
_LIMIT = 600.0
_CASES = {
    # name: (unit, whether less is better)
    "decode, 1 stream": ("tokens/s", False),
    "decode, 8 streams": ("tokens/s, sum", False),
    "prompt": ("tokens/s", False),
    "time to first token, short prompt": ("s", True),
    "the same prompt again, time to first token": ("s", True),
    "the same prompt again, share of the first time": ("", True),
}


@dataclass(slots=True)
class Contestant:
    """A server that runs, and what was found out about it.

    Attributes:
        base_url: with its /v1; model: the id it knows the model by.
        without: a field that it refuses.
    """

    name: str
    base_url: str
    pid: int
    model: str
    without: str = ""
    found: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.pid)
        return [parent, *parent.children(recursive=True)]

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        for process in self.processes():
            process.resume()
        try:
            yield
        finally:
            for process in self.processes():
                self.peaks[process.pid] = peak_rss_bytes(process.pid)
                process.suspend()

    def ask(self, case: str, number: int, texts: list[str], max_tokens: int) -> list[dict[str, Any]]:
        """Send all at once; the answers, whose token counts are noted under the case."""
        bodies = [served.chat(self.model, text, max_tokens) for text in texts]
        bodies = [{key: value for key, value in body.items() if key != self.without} for body in bodies]
        answers: list[dict[str, Any]] = served.ask(self.base_url, bodies, len(bodies), _LIMIT)["answers"]
        self.counts[case, number] = sum(a["prompt_tokens"] for a in answers), sum(a["tokens"] for a in answers)
        return answers


class Prompts:
    """Texts that make prompts of a given length, as the checkpoint's tokenizer and chat template count."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def tokens(self, text: str) -> int:
        message = [{"role": "user", "content": text}]
        return len(self._tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])

    def text(self, tokens: int, number: int) -> str:
        """One that no other number begins with, so that no prefix cache knows it.

        Raises:
            RuntimeError: the template alone is longer, or its tokenizer joins what is added to fill up.
        """
        size = 2 * tokens
        while size and self.tokens(served.words(size, number)) > tokens:
            size -= max(2, (self.tokens(served.words(size, number)) - tokens) // 2 // 2 * 2)
        text = served.words(max(size, 0), number)
        text += " the" * (tokens - self.tokens(text))
        if self.tokens(text) != tokens:
            raise RuntimeError(f"no prompt of exactly {tokens} tokens could be made, only of {self.tokens(text)}")
        return text


def measure(contestant: Contestant, number: int, settings: argparse.Namespace, prompts: Prompts) -> dict[str, float]:
    """All cases once. Prompts are those of the repetition, the same for everybody and new to them."""
    first = number * 1000
    short = [prompts.text(settings.short, first + i) for i in range(9)]
    long = prompts.text(settings.long, first + 100)
    with contestant.awake():
        (one,) = contestant.ask("one", number, short[:1], settings.tokens)
        crowd = contestant.ask("crowd", number, short[1:], settings.tokens)
        (cold,) = contestant.ask("cold", number, [long], 1)
        (warm,) = contestant.ask("warm", number, [long], 1)
    return {
        "decode, 1 stream": (one["tokens"] - 1) / (one["times"][-1] - one["times"][0]),
        "decode, 8 streams": _together(crowd),
        "prompt": cold["prompt_tokens"] / cold["times"][0],
        "time to first token, short prompt": one["times"][0],
        "the same prompt again, time to first token": warm["times"][0],
        "the same prompt again, share of the first time": warm["times"][0] / cold["times"][0],
    }


def _together(answers: list[dict[str, Any]]) -> float:
    """Tokens a second of all streams while all of them run: from the last one's first event to the first one's last.

    Of a server that answers one after the other: from the first event of all to the last.
    """
    begin, end = max(a["times"][0] for a in answers), min(a["times"][-1] for a in answers)
    if end <= begin:
        begin, end = min(a["times"][0] for a in answers), max(a["times"][-1] for a in answers)
    # A token without text of its own makes no event: events are weighted by what the answer's usage says.
    tokens = sum(sum(begin < t <= end for t in a["times"]) * a["tokens"] / len(a["times"]) for a in answers)
    return float(tokens / (end - begin))


# -- who takes part ---------------------------------------------------------------------------------------------------


def contestants(stack: contextlib.ExitStack, settings: argparse.Namespace) -> list[Contestant]:
    """Start all of them; each is stopped until its turn."""
    variants: dict[str, dict[str, Any]] = {OURS: {}}
    if settings.int8:
        variants[f"{OURS} int8"] = {"quantization": "int8"}
    found = []
    for label, entry in variants.items():
        server = stack.enter_context(
            served.serve(
                settings.model, device="cpu", threads=settings.threads, max_sequences=8, context_length=2048, **entry
            )
        )
        found.append(_asleep(Contestant(label, server.base_url, server.pid, served.MODEL)))
    for label, file in settings.gguf:
        command = [
            str(settings.llama_server),
            "-m",
            str(file),
            "-t",
            str(settings.threads),
            "-tb",
            str(settings.threads),
        ]
        # Every slot has its own share of -c.
        command += ["-np", "8", "-c", str(8 * 2048), "--jinja", "--no-webui", "--host", "127.0.0.1"]
        found.append(_other(stack, f"llama.cpp {label}", command, "/health", "any"))
    name = str(settings.model.resolve())  # what both of these call a model
    if settings.transformers:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(settings.model.resolve())]
        command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
        found.append(_other(stack, "transformers", command, "/health", name, settings.threads, "ignore_eos"))
    if settings.vllm:
        if importlib.util.find_spec("vllm") is None:
            raise SystemExit("--vllm: the package vllm is not installed here.")
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(settings.model.resolve())]
        command += ["--dtype", "float32", "--max-num-seqs", "8", "--max-model-len", "2048", "--host", "127.0.0.1"]
        found.append(_other(stack, "vllm", command, "/health", name, settings.threads))
    return found


def _other(
    stack: contextlib.ExitStack,
    name: str,
    command: list[str],
    ready: str,
    model: str,
    threads: int | None = None,
    without: str = "",
) -> Contestant:
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    server = stack.enter_context(served.run(command, ready, limits))
    return _asleep(Contestant(name, server.base_url, server.pid, model, without))


def _asleep(contestant: Contestant) -> Contestant:
    with contestant.awake():  # whatever is made at the first request is made now
        contestant.ask("first", 0, [served.words(16, 999_999)], 4)
    return contestant


# -- the report -------------------------------------------------------------------------------------------------------


def tell(report: Report, all_of_them: list[Contestant], settings: argparse.Namespace) -> None:
    """A row a case, and who counted otherwise than we do."""
    ours = all_of_them[0]
    for other in all_of_them[1:]:
        for key, counts in other.counts.items():
            if counts != ours.counts[key]:
                raise RuntimeError(
                    f"{other.name}, {key}: {counts} prompt and answer tokens, {ours.name} {ours.counts[key]}"
                )
    long, short = ours.counts["cold", 1][0], ours.counts["one", 1][0]
    lengths = {"prompt": f" of {long:,} tokens", "time to first token, short prompt": f" ({short} tokens)"}
    for case, (unit, less) in _CASES.items():
        values = {c.name: summary(c.found[case]) for c in all_of_them}
        note = "; ".join(
            f"{OURS} {'÷' if not less else 'in'} {c.name} {ratios(ours.found[case], c.found[case])['median']:.2f}"
            for c in all_of_them[1:]
        )
        report.add(case + lengths.get(case, ""), unit, values, note=note)
    report.add(
        "peak memory",
        "GiB resident",
        {c.name: summary([sum(c.peaks.values()) / 2**30]) for c in all_of_them},
        note="of the whole process tree since its start, mapped files as far as they were in memory.",
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label", help="the model's name in the report")
    parser.add_argument("--int8", action="store_true", help="this server with quantization: int8, too")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server program")
    parser.add_argument(
        "--gguf", action="append", default=[], metavar="LABEL=FILE", help="the same model for llama.cpp"
    )
    parser.add_argument("--transformers", action="store_true", help="`transformers serve`, too")
    parser.add_argument("--vllm", action="store_true", help="`vllm serve`, too")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--short", type=int, default=64, help="tokens of a short prompt")
    parser.add_argument("--long", type=int, default=1024, help="tokens of the long prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    settings = parser.parse_args(argv)
    pairs = [text.partition("=") for text in settings.gguf]
    if any(not label or not file for label, _, file in pairs):
        parser.error("--gguf takes LABEL=FILE")
    if pairs and settings.llama_server is None:
        parser.error("--gguf needs --llama-server")
    settings.gguf = [(label, Path(file)) for label, _, file in pairs]
    if settings.quick:
        settings.repeat, settings.short, settings.long, settings.tokens = 1, 64, 128, 24
    return settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv)
    report = Report(
        "compare",
        settings.label or settings.model.resolve().name,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(settings.threads),
        {key: getattr(settings, key) for key in ("repeat", "short", "long", "tokens")},
        settings.quick,
    )
    prompts = Prompts(settings.model)
    with contextlib.ExitStack() as stack:
        all_of_them = contestants(stack, settings)
        for number in range(1, settings.repeat + 1):
            for contestant in all_of_them if number % 2 else all_of_them[::-1]:
                for case, value in measure(contestant, number, settings, prompts).items():
                    contestant.found.setdefault(case, []).append(value)
    tell(report, all_of_them, settings)
    report.show()
    if settings.out or not settings.quick:
        print(report.write(settings.out or RESULTS).name)


if __name__ == "__main__":
    main()

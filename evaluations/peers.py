"""The same evaluations on several servers: how much do their numbers move from one request at once to eight?

    python -m evaluations.peers --model smollm2 [--transformers] [--llama-server PROGRAM --gguf F32=FILE …]

Each server is started alone, on loopback, with the same number of threads, asked everything one request after the
other, once more so, then with eight requests at once, and stopped. Log-likelihoods can only be had from servers that
return those of a prompt: this one; llama.cpp's server and `transformers serve` return none. In their place stands
lm-eval's own backend for transformers, with one row per pass and with eight. Answers are asked for as chat, greedy.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import machine, real_model, served
from benchmarks.common import RESULTS, Summary, summary
from benchmarks.report import Report
from evaluations.clients import PYTHON, Clients, Result, chat, completions, different, flat, inspection
from evaluations.harness import ANSWERS, FACTS

ALONE, AGAIN, CROWD = "1 at once", "1 at once, again", "8 at once"
PASSES = {ALONE: 1, AGAIN: 1, CROWD: 8}
"""The passes over all items, and how many requests each keeps under way."""
SYSTEM = "Answer at length, and give your reasons."
"""Makes answers long: in a longer text, another bit has more time to become another word."""
MAX_TOKENS = 64
CONTEXT = 1024


@dataclass(slots=True)
class Contestant:
    """A server, or a backend, and what it answered in each pass."""

    name: str
    facts: dict[str, Result] = field(default_factory=dict)
    answers: dict[str, Result] = field(default_factory=dict)
    tokens: dict[str, Result] = field(default_factory=dict)
    """Answers with the log-probabilities of their tokens."""


def ask(contestant: Contestant, base_url: str, model: str, settings: argparse.Namespace, *, ours: bool) -> None:
    """Ask a server everything, pass by pass. `ours`: whether it returns log-probabilities of prompts."""
    clients = Clients(settings.limit, settings.threads)
    generation = {"max_gen_toks": MAX_TOKENS, "until": ["<|im_end|>"]}
    jobs = {ANSWERS: [chat(base_url, model, n, generation=generation, system=SYSTEM) for n in PASSES.values()]}
    if ours:
        jobs[FACTS] = [{**completions(base_url, model, settings.model, n), "tasks": [FACTS]} for n in PASSES.values()]
    results = iter(clients.harness([job for of_task in jobs.values() for job in of_task]))
    contestant.answers = dict(zip(PASSES, results, strict=False))
    contestant.facts = dict(zip(PASSES, results, strict=False))
    if contestant.name.startswith("transformers"):
        return  # its chat completions have no log-probabilities
    config = {
        "system_message": SYSTEM,
        "temperature": 0.0,
        "max_tokens": MAX_TOKENS,
        "logprobs": True,
        "top_logprobs": 1,
    }
    runs = clients.inspect([inspection(base_url, model, n, **config) for n in PASSES.values()])
    contestant.tokens = dict(zip(PASSES, runs, strict=True))


def contestants(settings: argparse.Namespace) -> Iterator[Contestant]:
    """Start one after the other and yield it when all is asked."""
    for name, more in (("verbatim", {}), ("verbatim int8", {"quantization": "int8"})):
        entry = {"device": "cpu", "threads": settings.threads, "max_sequences": 8, "context_length": CONTEXT, **more}
        with served.serve(settings.model, **entry) as server:
            one = Contestant(name)
            ask(one, server.base_url, served.MODEL, settings, ours=True)
        yield one
    for name, command, model in _others(settings):
        threads = {"OMP_NUM_THREADS": str(settings.threads), "MKL_NUM_THREADS": str(settings.threads)}
        with served.run([*command, "--host", "127.0.0.1"], "/health", threads) as server:
            one = Contestant(name)
            ask(one, server.base_url, model, settings, ours=False)
        yield one
    if settings.transformers:
        yield _backend(settings)


def _others(settings: argparse.Namespace) -> Iterator[tuple[str, list[str], str]]:
    """Yield name, command and the model's name of each of the other servers."""
    threads = str(settings.threads)
    for label, file in settings.gguf:
        command = [str(settings.llama_server), "-m", str(file), "-t", threads, "-tb", threads, "--jinja"]
        yield f"llama.cpp {label}", [*command, "-np", "8", "-c", str(8 * CONTEXT)], "any"
    if settings.transformers:
        path = str(settings.model.resolve())
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", path]
        command += ["--device", "cpu", "--dtype", "float32"]
        yield "transformers serve", command, path
        yield "transformers serve, continuous batching", [*command, "--continuous-batching"], path


def _backend(settings: argparse.Namespace) -> Contestant:
    """Run lm-eval's own backend: rows of one pass in place of requests at once."""
    hf = {"pretrained": str(settings.model.resolve()), "dtype": "float32", "device": "cpu"}
    jobs = [{"model": "hf", "arguments": hf, "batch_size": rows, "tasks": [FACTS]} for rows in PASSES.values()]
    results = Clients(settings.limit, settings.threads).harness(jobs)
    return Contestant("transformers, lm-eval's hf backend", dict(zip(PASSES, results, strict=True)))


# -- the report -------------------------------------------------------------------------------------------------------


def tell(report: Report, all_of_them: list[Contestant]) -> None:
    """A row for each thing that may differ, and the times."""
    for name in (AGAIN, CROWD):
        for what, task, results in (
            ("log-likelihoods", FACTS, {c.name: c.facts for c in all_of_them}),
            ("answers in words", ANSWERS, {c.name: c.answers for c in all_of_them}),
            ("answers or log-probabilities of their tokens", ANSWERS, {c.name: c.tokens for c in all_of_them}),
        ):
            values, counts = {}, set()
            for contestant, passes in results.items():
                if name in passes:
                    values[contestant] = _number(different(passes[ALONE], passes[name], task))
                    counts.add(len(flat(passes[ALONE], task)))
            report.add(f"{what} that differ from {ALONE}: {name}", f"of {max(counts)}", values)
    with_facts = [c for c in all_of_them if c.facts]
    report.add(
        f"the largest difference of a log-likelihood, {CROWD}",
        "nats",
        {c.name: _number(_largest(c.facts)) for c in with_facts},
    )
    report.add(
        f"right facts, {ALONE} → {CROWD}",
        "share",
        {f"{c.name}, {name}": _number(c.facts[name]["scores"][FACTS]) for c in with_facts for name in (ALONE, CROWD)},
    )
    for what, results in (
        ("facts", {c.name: c.facts for c in all_of_them}),
        ("answers", {c.name: c.answers for c in all_of_them}),
    ):
        for name in PASSES:
            seconds = {c: _number(passes[name]["seconds"]) for c, passes in results.items() if name in passes}
            report.add(f"time for all {what}, {name}", "s", seconds, note="the harness's own time included.")


def _number(value: float) -> Summary:
    return summary([float(value)])


def _largest(facts: dict[str, Result]) -> float:
    pairs = zip(flat(facts[ALONE], FACTS), flat(facts[CROWD], FACTS), strict=True)
    return max(abs(one[0] - other[0]) for one, other in pairs)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label", help="the model's name in the report")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server program")
    parser.add_argument("--gguf", action="append", default=[], metavar="LABEL=FILE", help="the model for llama.cpp")
    parser.add_argument("--transformers", action="store_true", help="transformers' server and lm-eval's backend, too")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--limit", type=int, help="items of each task; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="three items, to see that the runner works")
    settings = parser.parse_args(argv)
    pairs = [text.partition("=") for text in settings.gguf]
    if any(not label or not file for label, _, file in pairs):
        parser.error("--gguf takes LABEL=FILE")
    if pairs and settings.llama_server is None:
        parser.error("--gguf needs --llama-server")
    settings.gguf = [(label, Path(file)) for label, _, file in pairs]
    if settings.quick:
        settings.limit = 3
    return settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv)
    if not PYTHON.exists():
        sys.exit("the harnesses are not installed: run `make evaluations`")
    report = Report(
        "evaluations",
        settings.label or settings.model.resolve().name,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(settings.threads),
        {"limit": settings.limit, "max_tokens": MAX_TOKENS, "context_length": CONTEXT},
        settings.quick,
    )
    found = []
    with contextlib.closing(contestants(settings)) as running:
        for contestant in running:
            found.append(contestant)
            print(f"{contestant.name}: asked", file=sys.stderr, flush=True)
    tell(report, found)
    report.show()
    print(report.write(settings.out).name)


if __name__ == "__main__":
    main()

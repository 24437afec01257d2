"""Checks that evaluations do not move: harnesses as clients of servers on loopback, one run after the other.

    make evaluations                             the demo model, all items
    make evaluations ARGS="--model smollm2"      a trained model of 135 million parameters
    make evaluations ARGS="--limit 20"           the first 20 items of each task

Every log-likelihood of lm-evaluation-harness, every text and, from inspect-ai, every token's log-probability must be
the same to the last bit whatever the number of requests at once, with the prefix cache and without, in a new process.
The log-likelihoods must be those of lm-eval's own backend for transformers (`hf`), up to rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import real_model, served
from benchmarks.common import ROOT
from evaluations.clients import PYTHON, Clients, Result, chat, completions, different, flat, inspection
from evaluations.harness import ANSWERS, FACTS

TOLERANCE = 1e-4
"""How far a log-likelihood may be from that of `hf`, in nats."""
SAMPLING = {"temperature": 0.8, "seed": 7, "logprobs": True, "top_logprobs": 2, "max_tokens": 32}
"""inspect-ai draws its answers at a temperature: a seed makes them the same as well."""
SERVERS: dict[str, dict[str, Any]] = {
    "a server": {},
    "restarted": {},
    "no prefix cache, chunks of 64 tokens": {"prefix_cache": False, "max_batch_tokens": 64},
}
"""By name: further keys of the entry in models.yaml."""


@dataclass(slots=True)
class Found:
    """The results of all runs, by kind of run and then by name. The others must equal the first of their kind."""

    texts: dict[str, Result] = field(default_factory=dict)
    chats: dict[str, Result] = field(default_factory=dict)
    inspected: dict[str, Result] = field(default_factory=dict)


def measure(server: str, found: Found, clients: Clients, settings: argparse.Namespace) -> None:
    """Start one of the servers and run everything on it that is to be run on it."""
    first = not found.texts
    model: Path = settings.model
    entry = {"device": "cpu", "threads": settings.threads, **SERVERS[server]}
    with served.serve(model, **entry) as running:
        where = (running.base_url, served.MODEL)
        texts = {f"{n} at once": completions(*where, model, n) for n in ((1, 8, 32) if first else (32,))}
        if first:
            texts["8 prompts in a request"] = {**completions(*where, model, 1), "batch_size": 8}
            texts["prompts as text"] = completions(*where, model, 8, tokenized_requests=False)
            texts["the server's own tokenizer"] = completions(*where, None, 8)
        chats = {f"{n} at once": chat(*where, n) for n in ((1, 8, 32) if first else (32,))}
        results = iter(clients.harness([*texts.values(), *chats.values()]))
        for name in texts:
            found.texts[f"{server}: {name}"] = next(results)
        for name in chats:
            found.chats[f"{server}: {name}"] = next(results)
        numbers = (1, 8) if first else (8,)
        for n, result in zip(
            numbers, clients.inspect([inspection(*where, n, **SAMPLING) for n in numbers]), strict=True
        ):
            found.inspected[f"{server}: {n} at once"] = result


def verdicts(found: Found, reference: Result) -> Iterator[tuple[str, str, bool]]:
    """Yield what is compared, what was found, and whether it is as promised."""
    for kind, runs, tasks in (
        ("lm-eval, completions", found.texts, (FACTS, ANSWERS)),
        ("lm-eval, chat", found.chats, (ANSWERS,)),
        ("inspect-ai", found.inspected, (ANSWERS,)),
    ):
        name, one = next(iter(runs.items()))
        yield f"{kind}; {name}", ", ".join(f"{task} {score:.3f}" for task, score in one["scores"].items()), True
        for other, result in [*runs.items()][1:]:
            for task in tasks:
                count = different(one, result, task)
                yield f"{kind}; {other}; {task}", f"{count} of {len(flat(one, task))} differ", not count
    ours = next(iter(found.texts.values()))
    yield from _against_transformers(flat(ours, FACTS), flat(reference, FACTS))
    count = different(ours, reference, ANSWERS)
    yield f"lm-eval's hf backend; {ANSWERS}", f"{count} of {len(flat(ours, ANSWERS))} differ", not count


def _against_transformers(ours: list[Any], theirs: list[Any]) -> Iterator[tuple[str, str, bool]]:
    most = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    greedy = sum(a[1] != b[1] for a, b in zip(ours, theirs, strict=True))
    yield f"lm-eval's hf backend; {FACTS}", f"{most:.2g} nats apart at most", most <= TOLERANCE
    yield f"lm-eval's hf backend; {FACTS}, is_greedy", f"{greedy} of {len(ours)} differ", not greedy


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=real_model.model,
        default=ROOT / "demo" / "model",
        help="a folder with a checkpoint, or smollm2; default: the demo model",
    )
    parser.add_argument("--limit", type=int, help="items of each task; default: all")
    parser.add_argument("--threads", type=int, default=1, help="of the server; with other work on the cores, 1 is best")
    return parser.parse_args(argv)


def check(settings: argparse.Namespace, tell: Callable[[str], None] = print) -> bool:
    """Run everything, tell each verdict in a line, return whether all is as promised."""
    clients, found = Clients(settings.limit, settings.threads), Found()
    for server in SERVERS:
        measure(server, found, clients, settings)
    hf = {"pretrained": str(settings.model.resolve()), "dtype": "float32", "device": "cpu"}
    (reference,) = clients.harness([{"model": "hf", "arguments": hf}])
    right = True
    for what, result, as_promised in verdicts(found, reference):
        tell(f"{'ok   ' if as_promised else 'WRONG'}  {what}: {result}")
        right &= as_promised
    return right


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv)
    if not PYTHON.exists():
        sys.exit(f"{PYTHON.relative_to(ROOT)} is missing: run `make evaluations`")
    sys.exit(not check(settings))


if __name__ == "__main__":
    main()

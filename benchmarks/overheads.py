"""What everything but the model costs per token: scheduler, sampler, detokeniser, the whole step, the HTTP server.

    python benchmarks/overheads.py [--model DIR] [--streams 16] [--tokens 256] [--repeat R] [--out DIR] [--quick]

By default on the noise checkpoint. CPU time, not time on the clock: two cores may be shared, microseconds of CPU
are what a token takes from everybody else. Says nothing about how fast a model is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import AutoTokenizer

from benchmarks import counting, loopback, machine, metered, real_model, served, step_costs
from benchmarks.common import RESULTS, alternate, summary, thread_cpu_seconds
from benchmarks.report import Report
from engine import LLM, Constraint
from engine.checkpoints.checkpoint import prepare_environment
from engine.checkpoints.noise_checkpoint import ensure_noise_checkpoint
from engine.grammar.answer_grammar import answer_grammar
from engine.grammar.compiler import GrammarCompiler
from engine.text.vocabulary import Vocabulary

UNIT = "µs CPU/token"
GOAL = 100.0
"""Microseconds of CPU per streamed token at 16 streams."""
LARGE_VOCABULARY = 151_936  # Qwen3's


def engine(report: Report, model: Path, streams: int, tokens: int, repeat: int) -> None:
    """The parts of a step, in this process."""
    large = LARGE_VOCABULARY if not report.quick else LARGE_VOCABULARY // 32
    loaded = step_costs.open_model(model, streams)
    steps = step_costs.Steps(loaded, streams, tokens)
    forwards: list[float] = []

    def step(name: str) -> Callable[[int], float]:
        def once(_: int) -> float:
            forward, rest = steps.measure(step_costs.SAMPLINGS[name])
            forwards.append(forward)
            return rest

        return once

    def sampler(name: str, vocab_size: int, count: int) -> Callable[[int], float]:
        return lambda _: step_costs.sampler(vocab_size, step_costs.SAMPLINGS[name], streams, count)

    small = loaded.info.vocab_size
    parts: dict[str, Callable[[int], float]] = {
        "scheduler": lambda _: step_costs.scheduler(streams, tokens),
        "detokeniser": lambda _: step_costs.detokenizer(loaded.vocabulary, (), 16 * tokens),
        "detokeniser, 4 stop strings": lambda _: step_costs.detokenizer(
            loaded.vocabulary, ("\n\nUser:", "</s>", "###", "Observation:"), 16 * tokens
        ),
    }
    for name in step_costs.SAMPLINGS:
        parts[f"sampler, {small} tokens, {name}"] = sampler(name, small, tokens)
        parts[f"sampler, {large} tokens, {name}"] = sampler(name, large, max(tokens // 32, 1))
        parts[f"whole step without the forward pass, {name}"] = step(name)
    alternate(parts, 1)
    forwards.clear()
    values = alternate(parts, repeat)
    for name, costs in values.items():
        report.add(name, UNIT, {f"{streams} streams": summary(costs)})
    report.add(
        "forward pass of this model, for comparison",
        UNIT,
        {f"{streams} streams": summary(forwards)},
        note="one kernel thread; not part of the rows above.",
    )


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "red", "blue"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "since": {"type": "string", "format": "date"}},
            "required": ["city", "since"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
DOCUMENT = {
    "name": "Ada Lovelace, countess",
    "age": 36,
    "tags": ["new", "red"],
    "address": {"city": "London, Marylebone", "since": "1835-07-08"},
}


def grammars(report: Report, model: Path, streams: int, tokens: int, repeat: int) -> None:
    """What it costs to hold replies to a schema: time on the clock, with the threads that llguidance takes."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    size = vocabulary.size

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids = encode(json.dumps(DOCUMENT))
    made, first, taken, batch = [], [], [], []
    masks: dict[str, list[float]] = {"first": [], "second": []}
    for number in range(repeat + 1):  # the first warms up
        started = time.perf_counter()
        compiler = GrammarCompiler(vocabulary, size, [tokenizer.eos_token_id], encode)
        compiler.start("start: /a/")
        built = time.perf_counter()
        fresh = {**SCHEMA, "title": f"fresh {number}"}
        grammar = answer_grammar(compiler, Constraint("json", fresh)).text
        states = [compiler.start(grammar) for _ in range(9)]
        compiler.masks(states[:1], [states[0].forced])
        begun = time.perf_counter()
        steps: list[float] = []
        spent: dict[str, list[float]] = {name: [] for name in masks}
        for document, state in zip(spent, states, strict=False):
            for token in ids:
                at = time.perf_counter()
                compiler.masks([state], [state.forced])
                masked = time.perf_counter()
                state.consume(token)
                spent[document].append(masked - at)
                steps.append(time.perf_counter() - masked)
        together = time.perf_counter()
        for token in ids:
            compiler.masks(states[2:], [state.forced for state in states[2:]])
            for state in states[2:]:
                state.consume(token)
        done = time.perf_counter()
        if number:
            made.append((built - started) * 1e3)
            first.append((begun - built) * 1e3)
            for document, values in spent.items():
                masks[document].append(statistics.mean(values[1:]) * 1e6)
            taken.append(statistics.mean(steps[1:]) * 1e6)
            batch.append((done - together) / len(ids) * 1e6)
    name = f"{size} tokens"
    report.add("grammar: the tokenizer made ready, once a model", "ms", {name: summary(made)})
    report.add(
        "grammar: first token of a new schema",
        "ms",
        {name: summary(first)},
        goal="< 50",
        met=summary(first)["median"] < 50,
    )
    report.add(
        "grammar: mask of one token, the schema's first document",
        "µs",
        {name: summary(masks["first"])},
        note="llguidance builds its automata as they are needed.",
    )
    seen = summary(masks["second"])
    report.add(
        "grammar: mask of one token, its second document",
        "µs",
        {name: seen},
        goal="< 100",
        met=seen["median"] < 100,
        note=f"mean over the {len(ids)} tokens of a document of four fields, but the first; a row of booleans.",
    )
    report.add("grammar: taking one token", "µs", {name: summary(taken)}, note="with the forced text after it.")
    report.add("grammar: mask and step of 7 sequences together", "µs", {name: summary(batch)})
    _constrained_steps(report, model, tokens, repeat)


def _constrained_steps(report: Report, model: Path, tokens: int, repeat: int) -> None:
    """A decoding step of eight sequences, held to a schema and free, in turns: the whole engine with the model."""
    llm = LLM(model, cache_size="1GiB", context_length=1024)
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 200}  # goes on until it is cut
    how: dict[str, dict[str, Any]] = {"free": {}, "schema": {"constraint": Constraint("json", schema)}}
    medians: dict[str, list[float]] = {name: [] for name in how}
    for turn in range(repeat + 1):
        for name, asked in how.items():
            sampling = {"max_tokens": tokens, "ignore_eos": True}
            ids = [llm.add(f"{turn} {i}", **asked, **sampling, seed=i).request_id for i in range(8)]
            llm.engine.step()  # the prompts
            spent = []
            while llm.engine.has_work:
                started = time.perf_counter()
                llm.engine.step()
                spent.append((time.perf_counter() - started) * 1e3)
            for request_id in ids:
                del llm._boxes[request_id]
            if turn:  # the first turn warms up
                medians[name].append(statistics.median(spent))
    ratios = summary([held / free for free, held in zip(medians["free"], medians["schema"], strict=True)])
    report.add(
        "grammar: a step of 8 sequences",
        "ms",
        {name: summary(values) for name, values in medians.items()},
        ratio=ratios,
        ratio_of="schema / free",
        goal="< 1.10",
        met=ratios["median"] < 1.10,
        note="arrays of strings; the median step of each turn.",
    )


def server(report: Report, model: Path, streams: int, tokens: int, repeat: int) -> None:
    """A real server over loopback: what it spends per streamed token, thread by thread."""
    whole, forward, loop, others, reads = [], [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        meter = Path(scratch, "meter")
        metered.create(meter)
        # In one process, whose threads are told apart; `benchmarks.isolation` compares it with two.
        entry = {"device": "cpu", "threads": 1, "max_sequences": streams, "isolation": "thread"}
        with served.serve(model, meter=meter, **entry) as running:
            for round_ in range(repeat + 1):  # the first warms up
                bodies = [
                    served.chat(served.MODEL, served.words(16, round_ * streams + i), tokens) for i in range(streams)
                ]
                before, passes_before = thread_cpu_seconds(running.pid), metered.read(meter)[0]
                result = served.ask(running.base_url, bodies, streams, 120)
                after, passes = thread_cpu_seconds(running.pid), metered.read(meter)[0] - passes_before
                if round_ == 0:
                    continue
                count = sum(a["tokens"] for a in result["answers"])
                scale = 1e6 / count
                spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
                whole.append(sum(spent.values()) * scale)
                forward.append(passes * scale)
                loop.append(spent[running.pid] * scale)  # the main thread has the process' id on Linux
                others.append(whole[-1] - loop[-1] - forward[-1])
                reads.append(sum(a["reads"] for a in result["answers"]) / count)
    ours = [a - b for a, b in zip(whole, forward, strict=True)]
    name = f"{streams} streams"
    report.add(
        "server without the forward pass",
        "µs CPU/streamed token",
        {name: summary(ours)},
        goal=f"< {GOAL:.0f}",
        met=summary(ours)["median"] < GOAL,
        note=f"{streams} requests at once, {tokens} tokens each, over loopback, greedy. All threads of the server, "
        "user and system time: accepting, parsing, template, tokenising and prompts spread over the tokens; scheduler, "
        "sampler, detokeniser; hand-over between threads, JSON, SSE, sockets. Left out: the forward pass, measured "
        "inside the same process; the client, a process of its own.",
    )
    report.add("· event loop thread (HTTP, JSON, SSE)", "µs CPU/streamed token", {name: summary(loop)})
    report.add(
        "· other threads (engine without forward, preparing)",
        "µs CPU/streamed token",
        {name: summary(others)},
        note="waiting for the interpreter lock costs no CPU, so it is not seen here but in the latencies of server.py.",
    )
    floor = [loopback.send_cost(streams, max(tokens // 2, 8)) for _ in range(repeat)]
    report.add(
        "· of it the system's own: one loopback send",
        "µs CPU/streamed token",
        {name: summary(floor)},
        note="300 bytes to another process, from a program that does nothing else; inside a server it costs more, for "
        "its caches are cold.",
    )
    counted = [counting.cost(2_000 if report.quick else 100_000) for _ in range(repeat)]
    report.add("· of it the metrics", "µs CPU/output", {name: summary(counted)}, note="one output a step and request.")
    report.add(
        "server with the forward pass",
        "µs CPU/streamed token",
        {name: summary(whole)},
        note=f"the noise checkpoint's pass on one kernel thread: {summary(forward)['median']:.0f} µs of it. The client "
        f"saw {summary(reads)['median']:.2f} reads per token: below 1, events travel together, which is cheaper.",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=real_model.model,
        help="a folder with a checkpoint, or smollm2; default: the noise checkpoint",
    )
    parser.add_argument("--label", help="the model's name in the report")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each stream")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=["engine", "grammars", "server"])
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.streams, arguments.tokens, arguments.repeat = 4, 16, 1
    prepare_environment(pull=False)
    model = arguments.model or ensure_noise_checkpoint()
    settings = {"streams": arguments.streams, "tokens": arguments.tokens, "repeat": arguments.repeat}
    label = arguments.label or ("noise" if arguments.model is None else model.resolve().name)
    commit, dirty = machine.commit()
    where = machine.describe(threads=1)
    report = Report("overheads", label, machine.utc_now(), commit, dirty, where, settings, arguments.quick)
    for name, part in (("engine", engine), ("grammars", grammars), ("server", server)):
        if arguments.only in (None, name):
            part(report, model, arguments.streams, arguments.tokens, arguments.repeat)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()

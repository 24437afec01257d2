"""The same replies again, in every circumstance that must not matter: how many bits differ?

    python benchmarks/replays.py --model DIR [--count 10000] [--tokens 24]

A table of requests (temperatures, filters, penalties, biases, choices, stop strings, grammars) is answered once, alone.
Then each is answered again and again: alone and among up to 64, with a cold and a warm prefix cache, with prompts in
chunks of 17, with a cache so small that sequences are preempted, on one thread and on two, in a new process's stead by
a newly loaded model, with drafts that are right, wrong or from the text, and over HTTP, whole and streamed. Tokens,
scores, finish reasons: everything that a receipt holds of a choice is compared, bit by bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import random
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds an engine.py that must not hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import machine, real_model
from benchmarks.common import RESULTS, summary
from benchmarks.report import Report
from benchmarks.served import MODEL, serve
from engine import LLM, ChatMessage, Constraint
from engine.compute.kv_cache import KEY_BLOCK
from engine.receipts.receipt import ChoiceRecord
from engine.receipts.recorder import Recorder, recorded
from engine.types.requests import GenerationRequest

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
FORMS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.02},
    {"temperature": 1.0, "n": 2},
    {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": -0.2, "repetition_penalty": 1.1},
    {"temperature": 1.0, "logit_bias": {100: 4.0, 200: -100.0}, "min_tokens": 8},
    {"temperature": 1.0, "stop": [".", "\n"]},
    {"temperature": 1.0, "logprobs": True, "top_logprobs": 4},
]
GRAMMAR = Constraint("regex", "[a-z ]{5,60}\\.")
SUBJECTS = ("the sea", "a clock", "bread", "winter", "numbers", "a small town", "glass", "the moon", "rivers", "a debt")
Record = tuple[ChoiceRecord, ...]


def requests(count: int, tokens: int) -> list[GenerationRequest]:
    """Different requests, the same ones every time."""
    made = []
    for number in range(count):
        form = FORMS[number % len(FORMS)]
        given = {"max_tokens": tokens, "seed": number, **form}
        text = f"Write {number % 7 + 1} lines about {SUBJECTS[number % len(SUBJECTS)]}. " + "Take your time. " * (
            number % 5
        )
        constraint = GRAMMAR if number % 10 == 9 else None
        request = GenerationRequest(
            request_id=f"r{number}", messages=(ChatMessage("user", text),), sampling=given, constraint=constraint
        )
        made.append(request)
    return made


class Replayer:
    """Answers requests with one loaded model, up to `load` at a time."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def run(
        self, wanted: list[GenerationRequest], load: int, draft: Callable[[int], tuple[int, ...]] | None = None
    ) -> list[Record]:
        engine, info = self.llm.engine, self.llm.info
        found: list[Record | None] = [None] * len(wanted)
        recorders: dict[str, tuple[int, Recorder]] = {}
        waiting = list(enumerate(wanted))[::-1]
        while waiting or engine.has_work:
            while waiting and len(recorders) < load:
                number, plain = waiting.pop()
                request = recorded(dataclasses.replace(plain, request_id=f"{plain.request_id}-{number}"), info, NOW)
                prepared = engine.prepare(request)
                if draft is not None:
                    prepared = dataclasses.replace(prepared, prediction=draft(number))
                recorders[request.request_id] = number, Recorder(request, prepared, info, id="r", created=0)
                engine.add(prepared)
            for output in engine.step():
                if output.error:
                    raise output.error
                number, recorder = recorders[output.request_id]
                recorder.add(output)
                if output.finished:
                    found[number] = recorder.receipt().choices
                    del recorders[output.request_id]
        return [record for record in found if record is not None]


def differing(one: list[Record], other: list[Record]) -> int:
    """How many replies are not the same, in any bit."""
    assert len(one) == len(other)
    return sum(a != b for a, b in zip(one, other, strict=True))


def circumstances(folder: Path, base: dict[str, Any]) -> Iterator[tuple[str, LLM, int, str]]:
    """Name, model, load, and which drafts: a newly loaded model for each setting."""
    plain = LLM(folder, **base)
    for load in (1, 16, 64):
        yield f"{load} at a time, warm cache", plain, load, ""
    yield "right drafts", plain, 8, "right"
    yield "wrong drafts", plain, 8, "wrong"
    for name, more in (
        ("no prefix cache", {"prefix_cache": False}),
        ("chunks of 17", {"max_batch_tokens": 17}),
        ("drafts from the text", {"speculation": "ngram"}),
        ("a cache that is too small", {"cache_size": 0}),
        ("loaded again", {}),
    ):
        if "cache_size" in more:
            more = {"cache_size": _small(plain), "context_length": 512}
        llm = LLM(folder, **{**base, **more})
        for load in (1, 16, 64):
            yield f"{name}, {load} at a time", llm, load, ""
        del llm


def _small(llm: LLM) -> int:
    """Bytes for the keys and values of some 700 tokens, and what lies behind the last block."""
    cache = llm.engine.model.runner.cache  # type: ignore[attr-defined]
    return int(sum(layer.bytes_per_token for layer in cache.layers) * (704 + KEY_BLOCK))


def over_http(address: str, number: int, tokens: int, *, stream: bool) -> Any:
    """The choices of the receipt that comes with a reply."""
    [request] = [requests(number + 1, tokens)[number]]
    assert request.messages is not None
    body: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "user", "content": request.messages[0].content}], "receipt": True,
        "stream": stream, **request.sampling,
    }  # fmt: skip
    if request.constraint is not None:
        body["guided_regex"] = request.constraint.value
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address.removesuffix('/v1')}/v1/chat/completions", data, headers), timeout=600
    ) as got:
        raw = got.read().decode()
    if not stream:
        return json.loads(raw)["receipt"]["choices"]
    chunks = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    return next(chunk["receipt"]["choices"] for chunk in reversed(chunks) if "receipt" in chunk)


def measure(report: Report, folder: Path, count: int, tokens: int) -> None:
    base: dict[str, Any] = {"device": "cpu", "context_length": 2048, "max_choices": 8, "max_sequences": 64}
    kinds = 90
    wanted = requests(kinds, tokens)
    first = Replayer(LLM(folder, **base))
    truth = first.run(wanted, 1)
    del first
    total = wrong = 0
    rng = random.Random(0)

    def note(name: str, replies: int, bad: int) -> None:
        nonlocal total, wrong
        total, wrong = total + replies, wrong + bad
        report.add(
            name, "differing replies", {"of": summary([replies]), "differ": summary([bad])}, met=bad == 0, goal="0"
        )
        print(f"{total:6} {name}: {bad} of {replies} differ", file=sys.stderr, flush=True)

    drafts: dict[str, Callable[[int], tuple[int, ...]]] = {
        "right": lambda number: truth[number][0].token_ids or (),
        "wrong": lambda number: tuple(rng.randrange(1000) for _ in truth[number][0].token_ids or ()),
    }
    rounds = 0
    while total < count:
        torch.set_num_threads(2 if rounds % 2 == 0 else 1)
        for name, llm, load, how in circumstances(folder, base):
            order = list(range(kinds))
            rng.shuffle(order)
            # The requests in another order, so that each has other neighbours.
            draft = drafts.get(how)
            shuffled = (lambda number, d=draft, o=tuple(order): d(o[number])) if draft else None
            found = Replayer(llm).run([wanted[i] for i in order], load, shuffled)
            threads = torch.get_num_threads()
            note(f"{name}, {threads} threads, round {rounds + 1}", kinds, differing(found, [truth[i] for i in order]))
            if total >= count:
                break
        rounds += 1
    torch.set_num_threads(2)
    expected = [[_told(choice) for choice in record] for record in truth]
    with serve(folder, context_length=2048, max_choices=8) as server:
        for load in (1, 16, 64):
            for stream in (False, True):
                with ThreadPoolExecutor(load) as pool:
                    got = list(
                        pool.map(lambda i, s=stream: over_http(server.base_url, i, tokens, stream=s), range(kinds))
                    )
                bad = sum([_told_json(c) for c in one] != two for one, two in zip(got, expected, strict=True))
                note(f"over HTTP, {load} at a time, {'streamed' if stream else 'whole'}", kinds, bad)
    report.add(
        "all", "differing replies", {"of": summary([total]), "differ": summary([wrong])}, met=wrong == 0, goal="0"
    )


def _told(choice: ChoiceRecord) -> tuple[Any, ...]:
    return choice.index, choice.finish_reason, choice.sha256, choice.bits


def _told_json(choice: dict[str, Any]) -> tuple[Any, ...]:
    return choice["index"], choice["finish_reason"], choice["sha256"], choice["bits"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.count, arguments.tokens = 300, 8
    report = Report(
        "replays",
        arguments.label or arguments.model.resolve().name,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(None),
        {"count": arguments.count, "tokens": arguments.tokens},
        arguments.quick,
    )
    measure(report, arguments.model, arguments.count, arguments.tokens)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)
    if any(row.met is False for row in report.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

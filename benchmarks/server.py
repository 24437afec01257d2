"""Time to first token, inter-token latency and throughput of a running server, over HTTP.

    python benchmarks/server.py --model DIR [--streams 1 8] [--requests N] [--seconds S]      starts a server, stops it
    python benchmarks/server.py --base-url http://127.0.0.1:8000/v1 --name ID                 asks one that runs

Any OpenAI-compatible server will do for --base-url. The client is benchmarks/load.py, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this very file would hide the package `server`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, real_model, served
from benchmarks.common import RESULTS, Summary, summary
from benchmarks.report import Report


def measure(report: Report, base_url: str, name: str, streams: int, arguments: argparse.Namespace) -> None:
    """One number of streams: warm up, then `requests` requests, at least one a stream."""
    count = max(arguments.requests, streams)
    more = {} if arguments.plain else {"ignore_eos": True}

    def body(number: int) -> dict[str, Any]:
        chat = served.chat(name, served.words(arguments.prompt, number), arguments.tokens)
        return {**{k: v for k, v in chat.items() if k != "ignore_eos"}, **more}

    first = streams * 100_000  # prompts of their own for every number of streams: nothing is in the prefix cache
    served.ask(base_url, [body(first - 1)], 1, arguments.seconds, arguments.api_key)
    bodies = [body(first + number) for number in range(count)]
    result = served.ask(base_url, bodies, streams, arguments.seconds, arguments.api_key)
    answers = result["answers"]
    gaps = sorted(b - a for answer in answers for a, b in zip(answer["times"], answer["times"][1:], strict=False))
    tokens = sum(a["tokens"] for a in answers)
    prompts = summary([a["prompt_tokens"] for a in answers])["median"]
    suffix = f", {streams} stream{'s' if streams > 1 else ''}"
    report.add(
        "time to first text" + suffix,
        "s",
        {name: summary([a["times"][0] for a in answers if a["times"]])},
        note=f"from the request's last byte to the first event with text, about {prompts:.0f} prompt tokens; "
        f"min … max over {len(answers)} requests.",
    )
    if gaps:
        report.add(
            "time between events" + suffix,
            "ms",
            {"p50": _constant(_quantile(gaps, 0.5) * 1e3), "p95": _constant(_quantile(gaps, 0.95) * 1e3)},
            note=f"{len(gaps)} gaps between events with text; a token without text of its own makes no event.",
        )
    paces = [
        (a["times"][-1] - a["times"][0]) / (a["tokens"] - 1) * 1e3 for a in answers if a["tokens"] > 1 and a["times"]
    ]
    if paces:
        report.add("time per output token" + suffix, "ms", {name: summary(paces)}, note="mean of each answer.")
    report.add(
        "throughput" + suffix,
        "tokens/s, sum",
        {name: _constant(tokens / result["seconds"])},
        note=f"{len(answers)} answers, {tokens} tokens by `usage`, in {result['seconds']:.3g} s from first to last "
        f"byte, prompts included; the client used {result['cpu_seconds']:.2g} s of CPU, its start included.",
    )


def _quantile(ascending: list[float], share: float) -> float:
    """The nearest-rank quantile."""
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)]


def _constant(value: float) -> Summary:
    return summary([value])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--model", type=real_model.model, help="a folder with a checkpoint, or smollm2: start a server on it"
    )
    target.add_argument("--base-url", help="a running server, with its /v1")
    parser.add_argument("--name", help="with --base-url: the model's id")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--label", help="the model's name in the report")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=8, help="for each number of streams")
    parser.add_argument("--seconds", type=float, default=300, help="no request is begun after so long")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens, about")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--plain", action="store_true", help="send no extension field (ignore_eos): for other servers")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="toy settings; writes nothing unless --out is given")
    arguments = parser.parse_args(argv)
    if arguments.base_url and not arguments.name:
        parser.error("--base-url needs --name, the id of a model there")
    if arguments.quick:
        arguments.streams, arguments.requests, arguments.seconds = [1, 4], 4, 20.0
        arguments.prompt, arguments.tokens = 16, 12
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    label = arguments.label or arguments.name or arguments.model.resolve().name
    settings = {k: getattr(arguments, k) for k in ("streams", "requests", "seconds", "prompt", "tokens")}
    settings["server"] = "started by this run" if arguments.model else "given by its address"
    report = Report(
        "server",
        label,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(arguments.threads),
        settings,
        arguments.quick,
    )
    with contextlib.ExitStack() as stack:
        if arguments.model:
            most = max(16, *arguments.streams)
            server = stack.enter_context(
                served.serve(arguments.model, device="cpu", threads=arguments.threads, max_sequences=most)
            )
            base_url, name = server.base_url, served.MODEL
        else:
            base_url, name = arguments.base_url, arguments.name
        for streams in arguments.streams:
            measure(report, base_url, name, streams, arguments)
    report.show()
    if arguments.out or not arguments.quick:
        print(report.write(arguments.out or RESULTS).name)


if __name__ == "__main__":
    main()

"""Servers side by side over HTTP, in one run on one machine: this one, llama.cpp's, transformers' own, vLLM's.

    python benchmarks/compare.py --model DIR [--int8] [--int4] [--no-float32] [--transformers] [--vllm]
        [--llama-server PROGRAM [--same FILE …] [--llama-model FILE …] [--gguf LABEL=FILE …]]

`--same` serves one GGUF file in both servers, `--llama-model` in llama.cpp's only, named by the kind that the file says
it has; `--gguf` names it otherwise. Several of each may be given.

Every server is a process of its own on loopback, with the same number of threads. They are measured one after the
other, every other repetition in reverse order; whoever is not being measured is stopped (SIGSTOP), so that nobody's
spinning threads cost another one anything. Prompts are sent as chat messages, greedy, to the end of `max_tokens`, and
have exactly the given number of tokens by the checkpoint's tokenizer and template; a contestant that counts other
prompt or answer tokens is an error, not a result.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: this folder holds files that must not hide packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, real_model, served
from benchmarks.common import RESULTS, summary
from benchmarks.goals import beside_the_best, goals
from benchmarks.report import Report
from benchmarks.rivals import Contestant, contestants, kind_of, version_of
from engine.errors import LoadError

_CASES = {
    # name: (unit, whether less is better)
    "decode, 1 stream": ("tokens/s", False),
    "decode, 8 streams": ("tokens/s, sum", False),
    "prompt": ("tokens/s", False),
    "time to first token, short prompt": ("s", True),
    "the same prompt again, time to first token": ("s", True),
    "the same prompt again, share of the first time": ("", True),
}


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
        report.add(case + lengths.get(case, ""), unit, values, note=beside_the_best(case, less, all_of_them))
    for name, note, size in _MEMORY:
        report.add(name, "GiB resident", {c.name: summary([size(c) / 2**30]) for c in all_of_them}, note=note)
    for row in goals(all_of_them):
        report.add(**row)


def _tree(when: str) -> str:
    return f"of the whole process tree {when}, mapped files as far as they were in memory."


_MEMORY: list[tuple[str, str, Callable[[Contestant], int]]] = [
    ("peak memory while loading", _tree("until its first answer"), lambda c: c.loaded[0]),
    ("memory when loaded", _tree("after its first answer"), lambda c: c.loaded[1]),
    ("peak memory", _tree("since its start"), lambda c: c.peak),
    ("memory after the run", _tree("at the end"), lambda c: c.resident),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=real_model.model, required=True, help="a folder with a checkpoint, or smollm2")
    parser.add_argument("--label", help="the model's name in the report")
    parser.add_argument("--int8", action="store_true", help="this server with quantization: int8, too")
    parser.add_argument("--int4", action="store_true", help="likewise with quantization: int4")
    parser.add_argument("--no-float32", action="store_true", help="leave out this server with the checkpoint as it is")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server program")
    files: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--same", **files, type=Path, metavar="FILE", help="a GGUF file for both servers")
    parser.add_argument("--llama-model", **files, type=Path, metavar="FILE", help="a GGUF file for llama.cpp's server")
    parser.add_argument("--gguf", **files, metavar="LABEL=FILE", help="likewise, under another name")
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
    try:
        settings.same = [(kind_of(file), file) for file in settings.same]
        only = [(kind_of(file), file) for file in settings.llama_model]
    except LoadError as error:
        parser.error(error.message)
    settings.gguf = [*settings.same, *only, *((label, Path(file)) for label, _, file in pairs)]
    if settings.gguf and settings.llama_server is None:
        parser.error("--same, --llama-model and --gguf need --llama-server")
    if settings.no_float32 and not (settings.int8 or settings.int4 or settings.same):
        parser.error("--no-float32 leaves nothing of this server: add --int8, --int4 or --same")
    labels = [label for label, _ in settings.gguf]
    if twice := {label for label in labels if labels.count(label) > 1}:
        parser.error(f"two files are called {min(twice)}; name one with --gguf")
    if settings.quick:
        settings.repeat, settings.short, settings.long, settings.tokens = 1, 64, 128, 24
    return settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv)
    about = {"llama.cpp": version_of(settings.llama_server)} if settings.gguf else {}
    report = Report(
        "compare",
        settings.label or settings.model.resolve().name,
        machine.utc_now(),
        *machine.commit(),
        machine.describe(settings.threads),
        {key: getattr(settings, key) for key in ("repeat", "short", "long", "tokens")} | about,
        settings.quick,
    )
    prompts = Prompts(settings.model)
    with contextlib.ExitStack() as stack:
        all_of_them = contestants(stack, settings)
        if uses := {one.uses for one in all_of_them} - {""}:
            report.settings["llama.cpp uses"] = "; ".join(sorted(uses))
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

"""The engine's law, as one table.

    The bits of a reply depend on the model, the prompt, the parameters and the seed. On nothing else.

Each row of the table is a circumstance that must not matter; each column a family of models. A reply is compared by its
token ids and by every log-probability, bit for bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, ChatMessage, Completion
from engine.llm import join_outputs

FAMILIES = ["qwen3", "llama", "gemma3_text", "phi3"]
SHORT = "the bits of a reply depend on the seed"
LONG = " ".join(f"word {i} of {i * 7 % 13} and" for i in range(60))
"""More than one key span of 512 tokens, so that a border of the attention kernel lies inside."""
PROMPTS = {"short": SHORT, "long": LONG}
PARAMS: dict[str, Any] = {
    "max_tokens": 12,
    "seed": 1234,
    "temperature": 0.9,
    "top_p": 0.95,
    "frequency_penalty": 0.4,
    "presence_penalty": -0.3,
    "repetition_penalty": 1.1,
    "logit_bias": {70: 2.5, 81: -100},
    "logprobs": True,
    "top_logprobs": 5,
}
Bits = tuple[tuple[int, ...], tuple[Any, ...]]


def open_model(folder: Path, **config: Any) -> LLM:
    return LLM(folder, **{"context_length": 1024, "cache_size": "64MiB", **config})


class Kept:
    """Opens a model once for all circumstances that want the same of it: it is idle and its cache empty each time.

    What came before is a circumstance more that must not matter. A model that was left at work is opened anew.
    """

    def __init__(self, make: Callable[..., LLM]) -> None:
        self._make = make
        self._opened: dict[tuple[Any, ...], LLM] = {}

    def __call__(self, folder: Path, **config: Any) -> LLM:
        key = (folder, *sorted(config.items()))
        llm = self._opened.get(key)
        if llm is None or llm.engine.has_work:
            llm = self._opened[key] = self._make(folder, **config)
        pool = llm.engine.model.scheduler.pool
        pool.clear_cache()
        pool.check()
        assert pool.num_free == pool.num_blocks
        return llm


def bits(completion: Completion) -> Bits:
    entries = completion.logprobs or ()
    numbers = tuple((e.logprob.hex(), *((t.token_id, t.logprob.hex()) for t in e.top)) for e in entries)
    assert len(numbers) == len(completion.token_ids)
    return completion.token_ids, numbers


def crowd() -> list[tuple[str, dict[str, Any]]]:
    """Fifteen neighbours that differ in everything."""
    return [
        (
            " ".join([f"neighbour {i}"] * (1 + 3 * i)),
            {
                "max_tokens": 3 + 2 * i,
                "seed": i - 7,
                "temperature": i / 10,
                "top_k": i % 4,
                "min_p": 0.01 * (i % 3),
                "n": 1 + (i % 5 == 0),
                "logprobs": i % 2 == 0,
                "stop": ["e"] if i % 4 == 3 else [],
            },
        )
        for i in range(15)
    ]


def run(llm: LLM, prompt: str, **params: Any) -> Bits:
    return bits(llm.generate(prompt, **{**PARAMS, **params})[0])


def alone(folder: Path, prompt: str) -> Bits:
    return run(open_model(folder), prompt)


def in_a_crowd(folder: Path, prompt: str) -> Bits:
    """Joins fifteen others that are already on their way; more keep waiting."""
    llm = open_model(folder, max_batch_tokens=96)
    for text, params in crowd():
        llm.add(text, **params)
    for _ in range(4):
        llm.engine.step()
    return run(llm, prompt)


def chunked(size: int) -> Callable[[Path, str], Bits]:
    def circumstance(folder: Path, prompt: str) -> Bits:
        return run(open_model(folder, max_batch_tokens=size), prompt)

    return circumstance


def cache_off(folder: Path, prompt: str) -> Bits:
    return run(open_model(folder, prefix_cache=False), prompt)


def cache_warm(folder: Path, prompt: str) -> Bits:
    llm = open_model(folder)
    run(llm, prompt)
    [completion] = llm.generate(prompt, **PARAMS)
    assert completion.usage.cached_tokens == completion.usage.prompt_tokens - 1, "the cache was not warm"
    return bits(completion)


def cache_half(folder: Path, prompt: str) -> Bits:
    """Half of the prompt is cached, and the cut lies inside a block."""
    llm = open_model(folder)
    llm.generate(prompt[: len(prompt) // 2] + "?", max_tokens=2, seed=1, adapter=PARAMS.get("adapter", ""))
    [completion] = llm.generate(prompt, **PARAMS)
    assert 0 < completion.usage.cached_tokens < completion.usage.prompt_tokens - 1
    return bits(completion)


def preempted(folder: Path, prompt: str) -> Bits:
    """A cache too small for all: the youngest request loses its keys and is recomputed, more than once."""
    llm = open_model(folder)
    scheduler = llm.engine.model.scheduler
    tokens = len(llm.engine.model.tokenizer(prompt)["input_ids"]) + PARAMS["max_tokens"]
    blocks = scheduler.pool.blocks_for(tokens)
    held = scheduler.pool.allocate(scheduler.pool.num_blocks - blocks - 3, "a hog")
    for seed in range(2):
        llm.add("an older request", max_tokens=60, ignore_eos=True, seed=seed)
    before = scheduler.num_preemptions
    request_id = llm.add(prompt, **PARAMS).request_id
    outputs = []
    for output in llm.outputs(request_id):
        outputs.append(output)
        if scheduler.num_preemptions == before:
            youngest = scheduler.running[-1]
            if youngest.request_id == request_id:
                scheduler._preempt(youngest)  # whatever the sizes, once for certain
    assert scheduler.num_preemptions > before
    scheduler.pool.release(held, "a hog")

    return bits(join_outputs(outputs, 0)[0])


def first_of_four(folder: Path, prompt: str) -> Bits:
    llm = open_model(folder)
    completions = llm.generate(prompt, **{**PARAMS, "n": 4})
    assert len({c.token_ids for c in completions}) > 1, "four choices with one face"
    return bits(completions[0])


def more_choices_than_places(folder: Path, prompt: str) -> Bits:
    return run(open_model(folder, max_sequences=2), prompt, n=5)


def streamed(folder: Path, prompt: str) -> Bits:
    outputs = list(open_model(folder).stream(prompt, **PARAMS))

    assert len(outputs) > 1
    return bits(join_outputs(outputs, 0)[0])


def with_threads(count: int) -> Callable[[Path, str], Bits]:
    def circumstance(folder: Path, prompt: str) -> Bits:
        before = torch.get_num_threads()
        try:
            llm = open_model(folder, threads=count)
            torch.set_num_threads(count)
            return run(llm, prompt)
        finally:
            torch.set_num_threads(before)

    return circumstance


def in_a_new_process(folder: Path, prompt: str) -> Bits:
    code = (
        "import json, sys; from pathlib import Path; import test_invariants as t; "
        "folder, prompt = json.load(sys.stdin); print(json.dumps(t.alone(Path(folder), prompt)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([str(folder), prompt]),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids, numbers = json.loads(done.stdout.splitlines()[-1])
    return tuple(ids), tuple((n[0], *map(tuple, n[1:])) for n in numbers)


class Oracle:
    """Guesses a reply that is known, but for every `wrong`-th token."""

    def __init__(self, reply: tuple[int, ...], wrong: int) -> None:
        self.reply = reply
        self.wrong = wrong

    def propose(self, sequence: Any, room: int) -> tuple[int, ...]:
        first = sequence.position
        guess = self.reply[first : first + min(room, 5)]
        return tuple(t ^ 1 if self.wrong and (first + i) % self.wrong == 0 else t for i, t in enumerate(guess))

    def learn(self, proposed: int, accepted: int) -> None:
        assert proposed


def guessed(wrong: int) -> Callable[[Path, str], Bits]:
    def circumstance(folder: Path, prompt: str) -> Bits:

        reply = alone(folder, prompt)[0]
        llm = open_model(folder, speculation="ngram")
        before = llm.engine.stats()
        request_id = llm.add(prompt, **PARAMS).request_id
        llm.engine._requests[request_id].choices[0].drafter = Oracle(reply, wrong)  # type: ignore[assignment]
        outputs = list(llm.outputs(request_id))
        stats = llm.engine.stats()
        assert stats.drafted_tokens > before.drafted_tokens
        assert (stats.accepted_tokens == before.accepted_tokens) == (wrong == 1)
        return bits(join_outputs(outputs, 0)[0])

    return circumstance


def while_another_loads(folder: Path, prompt: str) -> Bits:
    """transformers changes torch's default dtype, which is the whole process's, for as long as it loads a model."""
    llm = open_model(folder)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return run(llm, prompt)
    finally:
        torch.set_default_dtype(before)


CIRCUMSTANCES: dict[str, Callable[[Path, str], Bits]] = {
    "in a crowd of 16": in_a_crowd,
    "chunks of 1": chunked(1),
    "chunks of 7": chunked(7),
    "chunks of 64": chunked(64),
    "chunks of 512": chunked(512),
    "prefix cache off": cache_off,
    "prefix cache warm": cache_warm,
    "prefix cache half": cache_half,
    "preempted": preempted,
    "choice 0 of 4": first_of_four,
    "choice 0 of 5 with 2 places": more_choices_than_places,
    "streamed": streamed,
    "all guesses right": guessed(0),
    "some guesses wrong": guessed(3),
    "all guesses wrong": guessed(1),
    "1 thread": with_threads(1),
    "2 threads": with_threads(2),
    "while another model is loaded": while_another_loads,
    "a new process": in_a_new_process,
}


@pytest.fixture(scope="module")
def kept() -> Kept:
    return Kept(open_model)


@pytest.fixture(scope="module")
def baseline(tiny: Callable[[str], Path]) -> Callable[[str, str], Bits]:
    known: dict[tuple[str, str], Bits] = {}

    def get(family: str, prompt: str) -> Bits:
        if (family, prompt) not in known:
            known[family, prompt] = alone(tiny(family), PROMPTS[prompt])
        return known[family, prompt]

    return get


def _cases() -> Iterator[Any]:
    """All of them but for new processes, which take seconds each: a few, and the others in a sweep."""
    for circumstance in CIRCUMSTANCES:
        for family in FAMILIES:
            for prompt in PROMPTS:
                usual = (family, prompt) == (FAMILIES[0], "short")
                marks = () if usual else (pytest.mark.slow,)
                if circumstance == "a new process":
                    few = usual or (family, prompt) in ((FAMILIES[0], "long"), ("gemma3_text", "short"))
                    marks = (pytest.mark.slow,) if few else (pytest.mark.sweep,)
                yield pytest.param(circumstance, family, prompt, marks=marks)


@pytest.mark.parametrize(("circumstance", "family", "prompt"), list(_cases()))
def test_the_circumstance_does_not_matter(
    circumstance: str,
    family: str,
    prompt: str,
    tiny: Callable[[str], Path],
    baseline: Callable[[str, str], Bits],
    kept: Kept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = baseline(family, prompt)  # of a model that has said nothing before
    monkeypatch.setattr(sys.modules[__name__], "open_model", kept)
    assert CIRCUMSTANCES[circumstance](tiny(family), PROMPTS[prompt]) == right


@pytest.mark.parametrize("family", FAMILIES)
def test_what_must_matter_does(family: str, tiny: Callable[[str], Path]) -> None:
    """The table above would also hold for an engine that always says the same."""
    llm = open_model(tiny(family))
    replies = {
        run(llm, SHORT)[0],
        run(llm, SHORT, seed=1235)[0],
        run(llm, LONG)[0],
        run(llm, SHORT, temperature=0.2)[0],
        run(llm, SHORT, logit_bias={75: 100})[0],
    }
    assert len(replies) == 5


def test_temperature_zero_makes_all_choices_equal(tiny: Callable[[str], Path]) -> None:
    completions = open_model(tiny("qwen3")).generate(SHORT, n=3, temperature=0, max_tokens=8, seed=1)
    assert len({c.token_ids for c in completions}) == 1


def test_two_engines_in_one_process_do_not_disturb_each_other(tiny: Callable[[str], Path]) -> None:
    """No mutable module state: interleaved steps of two models give what each gives alone."""
    one, two = open_model(tiny("qwen3")), open_model(tiny("llama"))
    streams = [one.stream(SHORT, **PARAMS), two.stream(SHORT, **PARAMS)]
    ids: list[list[int]] = [[], []]
    for a, b in zip(*streams, strict=False):
        ids[0] += a.deltas[0].token_ids
        ids[1] += b.deltas[0].token_ids
    for llm, seen in zip((one, two), ids, strict=True):
        assert run(llm, SHORT)[0][: len(seen)] == tuple(seen)


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_the_fallback_runner_keeps_the_law_between_neighbours(family: str, tiny: Callable[[str], Path]) -> None:
    """Other kernels, other promises: nothing is packed or cut there, so neighbours still change nothing."""
    llm = open_model(tiny(family))
    assert llm.info.runner == "fallback"
    before = run(llm, SHORT)
    for text, params in crowd()[:6]:
        llm.add(text, **params)
    assert run(llm, SHORT) == before
    assert run(llm, SHORT, n=2) == before


def test_the_law_covers_chat_messages(tiny: Callable[[str], Path]) -> None:
    llm = open_model(tiny("qwen3"))
    messages = [ChatMessage("system", "be brief"), ChatMessage("user", "hello")]
    first, second = (bits(llm.generate(messages, **PARAMS)[0]) for _ in range(2))
    assert first == second

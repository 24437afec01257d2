"""A recorded reply can be proved: whatever the request, its receipt is found identical, and no other one is."""

from __future__ import annotations

import base64
import copy
import dataclasses
import datetime as dt
import hashlib
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, event, given, settings, strategies as st
from tiny_models import write
from tokenizers_for_tests import llama_like, unigram

from engine import (
    LLM,
    ChatMessage,
    Constraint,
    GenerationRequest,
    InvalidParameter,
    Receipt,
    ReceiptError,
    Recorder,
    Tool,
    ToolChoice,
    check_receipt,
    fingerprint_of,
    read_receipt,
    recorded,
)

TEMPLATE = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"
)
SCHEMA = {"type": "object", "properties": {"bb": {"type": "integer"}, "aa": {"enum": ["xyxyxyxy", "zz"]}}}
TOOLS = (Tool("look_up", "Looks up.", {"type": "object", "properties": {"name": {"type": "string"}}}),)

FORMS = st.one_of(
    st.just({}),
    st.just({"constraint": Constraint("json", SCHEMA)}),
    st.just({"constraint": Constraint("regex", "(ab|cd){3,20}")}),
    st.just({"constraint": Constraint("choice", ["yes, of course", "no", "no way"])}),
    st.just({"tools": TOOLS}),
    st.just({"tools": TOOLS, "tool_choice": ToolChoice("required")}),
)
SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.integers(0, 40), "seed": st.integers(-(2**63), 2**63 - 1), "ignore_eos": st.booleans()},
    optional={
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([0.3, 0.9]),
        "top_k": st.sampled_from([1, 5, 2**70]),
        "min_p": st.just(0.05),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.8, 1.3),
        "logit_bias": st.just({70: 3.5, 71: -100.0}),
        "stop": st.sampled_from([["a"], ["e ", "b"], ["zzz"]]),
        "stop_token_ids": st.just([80, 81]),
        "min_tokens": st.integers(0, 5),
        "logprobs": st.booleans(),
        "prompt_logprobs": st.just(1),
        "margins": st.booleans(),
        "thinking_budget": st.integers(0, 8),
        "reasoning_effort": st.sampled_from(["none", "high"]),
    },
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    return str(file)


@pytest.fixture(scope="module", params=["byte-level", "SentencePiece", "dummy prefix"])
def llm(request: pytest.FixtureRequest, template: str, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = write(tmp_path_factory.mktemp("model") / "tiny", "qwen3")
    if request.param == "SentencePiece":
        llama_like().save_pretrained(folder)
    if request.param == "dummy prefix":
        unigram().save_pretrained(folder)
    return LLM(folder, cache_size="32MiB", context_length=512, chat_template=template)


@pytest.fixture(scope="module")
def byte_level(tiny: Callable[[str], Path], template: str) -> LLM:
    return LLM(tiny("qwen3"), cache_size="32MiB", context_length=512, chat_template=template)


def receipt_for(llm: LLM, prompt: Any = None, **fields: Any) -> Receipt:
    prompt = [ChatMessage("user", "ab ab cd")] if prompt is None else prompt
    receipt = llm.generate(prompt, receipt=True, **fields)[0].receipt
    assert receipt is not None
    again = read_receipt(receipt.to_bytes())
    assert again == receipt
    return again


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(form=FORMS, sampling=SAMPLING, messages=st.booleans())
def test_any_reply_is_proved(llm: LLM, form: dict[str, Any], sampling: dict[str, Any], messages: bool) -> None:
    """Verified along its own tokens and generated again: equal in every bit, whatever has a say in the reply."""
    if sampling.get("min_tokens", 0) > sampling["max_tokens"]:
        sampling = {**sampling, "min_tokens": 0}
    prompt = [ChatMessage("user", "ab ab cd")] if messages else "ab ab cd"
    try:
        receipt = receipt_for(llm, prompt, **form, **sampling)
    except InvalidParameter as error:  # a bias and a grammar can forbid every token, a plain prompt has no tools
        event(error.code)
        return
    for mode in ("verify", "replay"):
        report = check_receipt(llm, receipt, mode=mode)
        assert report.verdict == "identical", report.sentence
        assert not llm.engine.has_work


def test_verifying_is_reading(byte_level: LLM) -> None:
    """A reply of 200 tokens is verified in a few steps, and generated in 200."""
    receipt = receipt_for(byte_level, max_tokens=200, seed=5, ignore_eos=True)
    steps = []
    for mode in ("verify", "replay"):
        before = byte_level.engine.stats().steps
        assert check_receipt(byte_level, receipt, mode=mode).verdict == "identical"
        steps.append(byte_level.engine.stats().steps - before)
    assert steps[0] <= 4


# -- a forger, who computes every digest again -------------------------------------------------------------------


def sealed(document: dict[str, Any]) -> bytes:
    """The bytes of a changed receipt with all digests as they then are."""
    for part in (document["prompt"], *document["choices"]):
        if "token_ids" in part:
            ids = part["token_ids"]
            part.update(tokens=len(ids), sha256=hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest())
    for choice in document["choices"]:
        choice["bits"] = hashlib.sha256(base64.b64decode(choice["scores"])).hexdigest()
    document.pop("digest", None)
    return rfc8785.dumps({**document, "digest": hashlib.sha256(rfc8785.dumps(document)).hexdigest()})


def _token(document: dict[str, Any], dice: random.Random) -> None:
    ids = dice.choice(document["choices"])["token_ids"]
    place = dice.randrange(len(ids))
    ids[place] = dice.choice([token for token in range(300) if token != ids[place]])


def _shorter(document: dict[str, Any], dice: random.Random) -> None:
    choice = dice.choice(document["choices"])
    choice["token_ids"].pop()
    choice["scores"] = base64.b64encode(base64.b64decode(choice["scores"])[:-8]).decode()
    if "margins" in choice:
        choice["margins"].pop()


def _longer(document: dict[str, Any], dice: random.Random) -> None:
    choice = dice.choice(document["choices"])
    choice["token_ids"].append(dice.randrange(300))
    choice["scores"] = base64.b64encode(base64.b64decode(choice["scores"]) + b"\0" * 8).decode()


def _score(document: dict[str, Any], dice: random.Random) -> None:
    choice = dice.choice(document["choices"])
    scores = bytearray(base64.b64decode(choice["scores"]))
    scores[dice.randrange(len(scores))] ^= 1 << dice.randrange(8)
    choice["scores"] = base64.b64encode(bytes(scores)).decode()


def _finish(document: dict[str, Any], dice: random.Random) -> None:
    choice = dice.choice(document["choices"])
    choice["finish_reason"] = dice.choice([w for w in ("stop", "length", "tool_calls") if w != choice["finish_reason"]])


def _margin(document: dict[str, Any], dice: random.Random) -> None:
    choice = document["choices"][0]
    choice["margins"][0] += 0.5
    known = [(margin, i) for i, margin in enumerate(choice["margins"]) if margin is not None]
    smallest, position = min(known)
    near = sum(margin < 1e-3 for margin, _ in known)
    choice["stability"] = {"smallest": smallest, "position": position, "near": near}


def _prompt_id(document: dict[str, Any], dice: random.Random) -> None:
    document["prompt"]["token_ids"][dice.randrange(document["prompt"]["tokens"])] ^= 1


def _message(document: dict[str, Any], dice: random.Random) -> None:
    document["request"]["messages"][0]["content"] += dice.choice("xyz")


def _seed(document: dict[str, Any], dice: random.Random) -> None:
    document["request"]["sampling"]["seed"] += 1


def _clock(document: dict[str, Any], dice: random.Random) -> None:
    document["request"]["clock"] = "1999-01-01T00:00:00"


def _file(document: dict[str, Any], dice: random.Random) -> None:
    file = dice.choice(document["model"]["resources"])
    file["digest"] = hashlib.sha256(file["digest"].encode()).hexdigest()
    digests = b"".join(bytes.fromhex(one["digest"]) for one in document["model"]["resources"])
    document["model"]["digest"] = hashlib.sha256(digests).hexdigest()


def _part(document: dict[str, Any], dice: random.Random) -> None:
    parts = document["environment"]["parts"]
    parts[dice.choice(["torch", "transformers", "verbatim"])] = "0.0.1"
    document["environment"]["fingerprint"] = fingerprint_of(parts, "vb-")


def _part_alone(document: dict[str, Any], dice: random.Random) -> None:
    document["environment"]["parts"]["torch"] = "0.0.1"


SEEDLESS = (
    _token,
    _shorter,
    _longer,
    _score,
    _finish,
    _margin,
    _prompt_id,
    _message,
    _clock,
    _file,
    _part,
    _part_alone,
)


FORGERIES = [
    (forge, temperature)
    for forge in (*SEEDLESS, _seed)
    for temperature in ((1.0,) if forge is _seed else (0.0, 1.0))  # a greedy reply does not depend on its seed
]


@pytest.mark.parametrize(("forge", "temperature"), FORGERIES, ids=lambda value: getattr(value, "__name__", value))
def test_one_change_is_never_identical(byte_level: LLM, forge: Any, temperature: float) -> None:
    """What a receipt claims is computed again, not believed: a forger who computes every digest again is found out."""
    for number in range(5):
        receipt = receipt_for(
            byte_level, n=2, max_tokens=20, seed=number, margins=True, temperature=temperature, ignore_eos=True
        )
        document = copy.deepcopy(receipt.to_json())
        forge(document, random.Random(number))
        try:
            forged = read_receipt(sealed(document))
        except ReceiptError:
            continue
        for mode in ("verify", "replay"):
            report = check_receipt(byte_level, forged, mode=mode)
            assert report.verdict != "identical", (mode, report.sentence)
            assert forge is _part or report.verdict in ("refuted", "not_checkable"), report.sentence


def test_tokens_that_nobody_could_write_end_no_engine(byte_level: LLM) -> None:
    """A stranger's receipt may hold any id: padding rows of the vocabulary, special tokens, what a grammar forbids."""
    forms: list[dict[str, Any]] = [
        {"ignore_eos": True},
        {"constraint": Constraint("regex", "(ab|cd){3,20}")},
        {"logprobs": True, "repetition_penalty": 1.2, "stop": ["q"]},
        {"thinking_budget": 2},
    ]
    vocab_size, dice = byte_level.info.vocab_size, random.Random(3)
    for form in forms:
        document = receipt_for(byte_level, max_tokens=12, **form).to_json()
        ids = document["choices"][0]["token_ids"]
        for token in (vocab_size - 1, vocab_size - 5, 0, 1, 2, 300):
            other = copy.deepcopy(document)
            place = dice.randrange(len(ids))
            other["choices"][0]["token_ids"][place] = token
            report = check_receipt(byte_level, read_receipt(sealed(other)))
            assert report.verdict == ("identical" if ids[place] == token else "refuted")
        other["choices"][0]["token_ids"][0] = vocab_size
        report = check_receipt(byte_level, read_receipt(sealed(other)))
        assert (report.verdict, f"holds token {vocab_size}, and" in report.sentence) == ("not_checkable", True)


# -- another environment -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=["bfloat16", "int8"])
def test_another_environment_tells_how_near_it_came(
    byte_level: LLM, tiny: Callable[[str], Path], template: str, other: dict[str, Any]
) -> None:
    """The verdict follows from what is told: no other token, tokens within the tolerance, or beyond it."""
    elsewhere = LLM(tiny("qwen3"), cache_size="32MiB", context_length=512, chat_template=template, **other)
    seen = set()
    for seed in range(12):
        receipt = receipt_for(byte_level, max_tokens=24, seed=seed, ignore_eos=True)
        report = check_receipt(elsewhere, receipt, tolerance=0.05)
        [choice] = report.choices
        seen.add(report.verdict)
        assert report.environment
        assert choice.largest_difference is not None
        assert report.verdict != "identical"
        assert (report.verdict == "reproduced") == (choice.different == 0)
        assert choice.drawn == 24
        again = check_receipt(elsewhere, receipt, mode="replay", tolerance=0.05)
        assert again == dataclasses.replace(report, mode="replay")
    assert len(seen) > 1


# -- what cannot be checked --------------------------------------------------------------------------------------


def test_a_prompt_beyond_this_models_context(byte_level: LLM, tiny: Callable[[str], Path], template: str) -> None:
    small = LLM(tiny("qwen3"), cache_size="32MiB", context_length=32, chat_template=template)
    report = check_receipt(small, receipt_for(byte_level, "a" * 60, max_tokens=4))
    assert report.verdict == "not_checkable"
    assert "this model refuses the request" in report.sentence
    report = check_receipt(small, receipt_for(byte_level, "a b c", max_tokens=100, ignore_eos=True))
    assert report.verdict == "not_checkable"
    assert "max_tokens 100 →" in report.sentence


def test_a_clock_is_part_of_the_request(byte_level: LLM) -> None:
    """A template that prints the date: the receipt's own date is printed when it is checked, whatever day that is."""
    llm = byte_level
    request = dataclasses.replace(llm.request([ChatMessage("user", "x")], max_tokens=3), clock=dt.datetime(1987, 6, 5))
    assert recorded(request, llm.info, dt.datetime(2026, 1, 1)).clock == dt.datetime(1987, 6, 5)
    prompt = llm.engine.model.tokenizer.decode(llm.engine.prepare(request).prompt_token_ids)
    assert prompt.startswith("05 June 1987<|im_start|>")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "ab", "add_special_tokens": False},
        {"prompt_token_ids": (70, 71, 72)},
        {"messages": (ChatMessage("user", "x"), ChatMessage("assistant", "ab")), "add_generation_prompt": False},
    ],
)
def test_how_a_prompt_is_made_is_part_of_the_request(byte_level: LLM, fields: dict[str, Any]) -> None:
    engine = byte_level.engine
    asked = GenerationRequest(request_id="r", sampling={"seed": 1, "max_tokens": 4}, **fields)
    request = recorded(asked, byte_level.info, dt.datetime(2026, 1, 1))
    prepared = engine.prepare(request)
    recorder = Recorder(request, prepared, byte_level.info, id="r", created=1)
    engine.add(prepared)
    while engine.has_work:
        for output in engine.step():
            recorder.add(output)
    assert check_receipt(engine, read_receipt(recorder.receipt().to_bytes())).verdict == "identical"


def test_an_engine_with_other_work_is_refused(byte_level: LLM) -> None:
    receipt = receipt_for(byte_level, max_tokens=3)
    added = byte_level.add("a", max_tokens=3)
    with pytest.raises(ValueError, match="other work"):
        check_receipt(byte_level, receipt)
    list(byte_level.outputs(added.request_id))
    assert check_receipt(byte_level, receipt).verdict == "identical"


def test_a_request_that_json_cannot_hold_queues_nothing(byte_level: LLM) -> None:
    with pytest.raises(ReceiptError, match="chat_template_kwargs"):
        byte_level.generate("a", receipt=True, chat_template_kwargs={"x": object()})
    assert not byte_level.engine.has_work

"""A reply that is cut anywhere and goes on from there is the same reply, bit by bit, whatever has a say in it."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write
from tokenizers_for_tests import llama_like, unigram

from engine import LLM, ChatMessage, Constraint, InvalidParameter, RequestOutput, Tool, ToolChoice, check_receipt
from engine.types.requests import GenerationRequest, PreparedRequest

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"
)
SCHEMA = {"type": "object", "properties": {"aa": {"type": "integer"}, "bb": {"enum": ["xyxyxyxy", "zz"]}}}
TOOLS = (Tool("look_up", "Looks up.", {"type": "object", "properties": {"name": {"type": "string"}}}),)
FORMS: dict[str, dict[str, Any]] = {
    "thoughts": {},
    "greedy": {"temperature": 0.0},
    "filters": {"temperature": 0.7, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
    "penalties": {"frequency_penalty": 0.9, "presence_penalty": -0.7, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {70: 6.0, 71: -100.0}, "min_tokens": 12},
    "end": {"ignore_eos": False, "logit_bias": {2: 4.0}, "min_tokens": 9},
    "stop": {"stop": ["ab", "e ", "zz"], "logit_bias": {66: 5.0, 67: 5.0}, "thinking_budget": 3},
    "stop id": {"stop_token_ids": list(range(60, 220)), "min_tokens": 6},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "logprobs_mode": "processed"},
    "answer": {"thinking_budget": 4, "logprobs": True},
    "margins": {"thinking_budget": 4, "margins": True, "logprobs": True},
    "form": {"constraint": Constraint("json", SCHEMA), "thinking_budget": 3},
    "expression": {"constraint": Constraint("regex", "(ab|cd){3,20}"), "temperature": 1.5, "thinking_budget": 2},
    "choice": {"constraint": Constraint("choice", ["yes, of course", "yes, maybe so"]), "thinking_budget": 2},
    "tool": {"tools": TOOLS, "tool_choice": ToolChoice("required"), "thinking_budget": 4},
    "tools": {"tools": TOOLS, "thinking_budget": 2},
}
QUESTION = (ChatMessage("user", "ab ab ab ab cd"),)


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


def prepared(llm: LLM, *, record: bool = True, **fields: Any) -> PreparedRequest:
    given = {"max_tokens": 40, "seed": 3, "ignore_eos": True, **fields}
    return llm.engine.prepare(dataclasses.replace(llm.request(QUESTION, **given), record=record))


def run(llm: LLM, requests: Sequence[PreparedRequest]) -> list[list[RequestOutput]]:
    """The outputs of each request, which share the steps."""
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        llm.engine.add(request)
    while llm.engine.has_work:
        for output in llm.engine.step():
            assert output.error is None, output.error
            outputs[output.request_id].append(output)
    pool = llm.engine.model.scheduler.pool
    pool.check()
    assert pool.num_free == pool.num_blocks
    return list(outputs.values())


@dataclasses.dataclass
class Reply:
    """One choice, and by token what had been shown before it."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    calls: list[Any] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    margins: list[float | None] = dataclasses.field(default_factory=list)
    scores: dict[int, Any] = dataclasses.field(default_factory=dict)
    shown: dict[int, tuple[str, str, int]] = dataclasses.field(default_factory=dict)
    finish: str | None = None


def replies(outputs: Sequence[RequestOutput], start: int = 0) -> list[Reply]:
    found: dict[int, Reply] = {}
    for delta in (delta for output in outputs for delta in output.deltas):
        reply = found.setdefault(delta.index, Reply())
        place = start + len(reply.tokens)
        reply.shown[place] = (reply.reasoning, reply.text, len(reply.calls))
        reply.scores.update({place: delta.scores[0]} if delta.scores else {})
        reply.tokens += delta.token_ids
        reply.text += delta.text
        reply.reasoning += delta.reasoning
        reply.calls += delta.tool_calls
        reply.logprobs += delta.logprobs or ()
        reply.margins += delta.margins or ()
        reply.finish = delta.finish_reason
    return [found[index] for index in sorted(found)]


def less(fields: dict[str, Any], cut: int, whole: int = 40) -> dict[str, Any]:
    """The request for the rest of a reply: what is counted in new tokens is less."""
    counted = {"max_tokens": whole - cut, "min_tokens": max(fields.get("min_tokens", 0) - cut, 0)}
    return {**fields, **counted}


@pytest.mark.parametrize("name", FORMS)
def test_a_reply_that_goes_on_from_any_token_is_the_same_reply(llm: LLM, name: str) -> None:
    """Its tokens, scores, log-probabilities, margins, end, calls; and its text, of which nothing is told twice."""
    fields = FORMS[name]
    try:
        [outputs] = run(llm, [prepared(llm, **fields)])
    except InvalidParameter:
        pytest.skip("this tokenizer cannot spell it")
    [whole] = replies(outputs)
    if name in ("stop id", "choice"):
        assert whole.finish == "stop", "a case that ends by itself"
    prompt = outputs[-1].usage.prompt_tokens
    cuts = [cut for cut in range(len(whole.tokens)) if cut or name == "thoughts"]
    requests = [prepared(llm, **less(fields, k), continue_token_ids=whole.tokens[:k]) for k in cuts]
    for k, found in zip(cuts, run(llm, requests), strict=True):
        [rest] = replies(found, k)
        assert rest.tokens == whole.tokens[k:]
        assert rest.finish == whole.finish or (whole.calls and not rest.calls and rest.finish == "stop")
        assert rest.logprobs == (whole.logprobs[k:] if fields.get("logprobs") else [])
        assert rest.margins == whole.margins[k:]
        assert {at: rest.scores[at] for at in whole.scores if at >= k} == {
            at: score for at, score in whole.scores.items() if at >= k
        }
        assert rest.calls == whole.calls[len(whole.calls) - len(rest.calls) :]
        usage = found[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (prompt + k, len(rest.tokens))
        if k in whole.shown:  # a forced token comes together with the one before it
            check_text(whole, rest, k)


def check_text(whole: Reply, rest: Reply, cut: int) -> None:
    """The rest's text is the whole one's, behind what was shown before the cut and what was held back there."""
    reasoning, text, calls = whole.shown[cut]
    assert len(rest.calls) == len(whole.calls) - calls
    for said, new, shown in ((whole.reasoning, rest.reasoning, reasoning), (whole.text, rest.text, text)):
        assert said.endswith(new)
        before = said.removesuffix(new)
        assert before.startswith(shown)
        assert len(before) - len(shown) <= 12, "only what may be part of a delimiter or a stop string is held back"


def test_nothing_is_told_twice_and_no_half_character(byte_level: LLM) -> None:
    """The new text begins behind the last whole character of the beginning, whatever was held back there."""
    fields = {"logprobs": True, "thinking_budget": 0, "stop": ["aaaaaa", "bbb", "é "], "logit_bias": {66: 3.0, 67: 3.0}}
    [outputs] = run(byte_level, [prepared(byte_level, **fields, max_tokens=60)])
    [whole] = replies(outputs)
    data = [entry.bytes for entry in whole.logprobs]
    begun = next(k for k in range(len(data)) if whole.shown[k][1])
    cuts = range(begun, len(data))
    requests = [prepared(byte_level, **less(fields, k, 60), continue_token_ids=whole.tokens[:k]) for k in cuts]
    for k, found in zip(cuts, run(byte_level, requests), strict=True):
        [rest] = replies(found, k)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        seen = decoder.decode(b"".join(data[:k])).rpartition("</think>")[2].lstrip()
        if whole.text.startswith(seen):
            assert seen + rest.text == whole.text
        else:
            assert rest.text == "", "a stop string that began before the cut"


def test_choices_go_on_from_one_beginning(byte_level: LLM) -> None:
    """Choice 0 is the reply of n = 1; the others are drawn as their own choices, from the same beginning."""
    [[whole]] = map(replies, run(byte_level, [prepared(byte_level)]))
    begun = {"continue_token_ids": whole.tokens[:10], "max_tokens": 30}
    [found] = run(byte_level, [prepared(byte_level, **begun, n=3)])
    first, *others = replies(found)
    assert first.tokens == whole.tokens[10:]
    assert all(other.tokens != first.tokens for other in others)
    assert found[-1].usage.prompt_tokens == len(prepared(byte_level).prompt_token_ids) + 10
    assert found[-1].usage.completion_tokens == 90
    [again] = run(byte_level, [prepared(byte_level, **begun, n=3)])
    assert [reply.tokens for reply in replies(again)] == [first.tokens, *(other.tokens for other in others)]


def test_thoughts_are_counted_where_they_are_generated(byte_level: LLM) -> None:
    [outputs] = run(byte_level, [prepared(byte_level, thinking_budget=9)])
    [whole] = replies(outputs)
    thoughts = outputs[-1].usage.reasoning_tokens
    for k in (4, 9, 20):
        [found] = run(byte_level, [prepared(byte_level, thinking_budget=9, continue_token_ids=whole.tokens[:k])])
        assert found[-1].usage.reasoning_tokens == max(thoughts - k, 0)


def test_a_preempted_reply_goes_on_alike(byte_level: LLM) -> None:
    """A small cache, in which replies that go on lose their blocks and are computed again."""
    [[whole]] = map(replies, run(byte_level, [prepared(byte_level, max_tokens=120)]))
    pool = byte_level.engine.model.scheduler.pool
    hog = pool.allocate(pool.num_free - 24, "a hog")
    before = byte_level.engine.model.scheduler.num_preemptions
    requests = [prepared(byte_level, max_tokens=120 - k, continue_token_ids=whole.tokens[:k]) for k in range(5, 60, 5)]
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        byte_level.engine.add(request)
    while byte_level.engine.has_work:
        for output in byte_level.engine.step():
            outputs[output.request_id].append(output)
    pool.release(hog, "a hog")
    for request, k in zip(requests, range(5, 60, 5), strict=True):
        assert replies(outputs[request.request_id])[0].tokens == whole.tokens[k:]
    assert byte_level.engine.model.scheduler.num_preemptions > before


@pytest.mark.parametrize("name", ["thoughts", "penalties", "stop", "form", "tool", "choice"])
def test_a_receipt_proves_a_reply_that_went_on(llm: LLM, name: str) -> None:
    fields = {"max_tokens": 40, "seed": 3, "ignore_eos": True, **FORMS[name]}
    try:
        [whole] = llm.generate(QUESTION, **fields)
    except InvalidParameter:
        pytest.skip("this tokenizer cannot spell it")
    cut = len(whole.token_ids) // 2
    [rest] = llm.generate(QUESTION, receipt=True, continue_token_ids=whole.token_ids[:cut], **less(fields, cut))
    assert rest.token_ids == whole.token_ids[cut:]
    assert rest.receipt is not None
    assert rest.receipt.request["continue_token_ids"] == list(whole.token_ids[:cut])
    for mode in ("verify", "replay"):
        assert check_receipt(llm, rest.receipt, mode=mode).verdict == "identical"
    forged = {**rest.receipt.request, "continue_token_ids": [5, *whole.token_ids[1:cut]]}
    report = check_receipt(llm, dataclasses.replace(rest.receipt, request=forged))
    assert report.verdict in ("refuted", "not_checkable"), "another beginning"


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("no such token", {"continue_token_ids": [5, 10**6]}, "continue_token_ids.1", "1000000"),
    ("negative", {"continue_token_ids": [-1]}, "continue_token_ids.0", "-1"),
    ("ended", {"continue_token_ids": [70, 2, 71], "ignore_eos": False}, "continue_token_ids", "ends with token 1"),
    ("stop id", {"continue_token_ids": [70, 80], "stop_token_ids": [80]}, "continue_token_ids", "ends with token 1"),
    ("both", {"continue_token_ids": [70], "continue_final_message": True}, "continue_token_ids", "cannot be combined"),
    ("the user's", {"continue_final_message": True}, "messages.0.role", "'user'"),
]


@pytest.mark.parametrize(
    ("fields", "param", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_cannot_go_on_is_refused_by_name(byte_level: LLM, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        prepared(byte_level, **fields)
    assert refused.value.param == param
    assert words in refused.value.message


@pytest.mark.parametrize(("text", "words"), [("12a", "token 2"), ("1234", "is a whole reply already")])
def test_a_beginning_that_is_not_of_the_form_is_refused(byte_level: LLM, text: str, words: str) -> None:
    ids = byte_level.engine.preparer.tokenize(GenerationRequest(request_id="t", prompt=text)).tokens
    form = Constraint("regex", "[0-9]{4}", param="guided_regex")
    request = GenerationRequest(
        request_id="r", prompt="ab", constraint=form, continue_token_ids=ids, sampling={"max_tokens": 9}
    )
    with pytest.raises(InvalidParameter) as refused:
        byte_level.engine.prepare(request)
    assert refused.value.param == "continue_token_ids"
    assert words in refused.value.message
    assert "guided_regex" in refused.value.message
    good = dataclasses.replace(request, continue_token_ids=ids[:2])
    [[found]] = map(replies, run(byte_level, [byte_level.engine.prepare(good)]))
    assert len(text[:2] + found.text) == 4
    assert found.text.isdigit()


def test_a_plain_prompt_goes_on_too(byte_level: LLM) -> None:
    sampling = {"seed": 5, "max_tokens": 20, "frequency_penalty": 0.8, "ignore_eos": True}
    request = GenerationRequest(request_id="whole", prompt="ab ab cd", sampling=sampling)
    [[whole]] = map(replies, run(byte_level, [byte_level.engine.prepare(request)]))
    rest = dataclasses.replace(request, request_id="rest", continue_token_ids=tuple(whole.tokens[:8]))
    [[found]] = map(replies, run(byte_level, [byte_level.engine.prepare(rest)]))
    assert found.tokens[:12] == whole.tokens[8:]

"""Drafts of any length change no reply, whatever else has a say in it: grammars, tools, thoughts, penalties, choices.

A reply is generated plainly. Then the same request is drafted (right, wrong or half right), and followed as a reply
that is checked. Tokens, texts, log-probabilities and scores are compared bit by bit.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import (
    LLM,
    ChatMessage,
    Constraint,
    InvalidParameter,
    NumericalFault,
    RequestOutput,
    Tool,
    ToolChoice,
    preparation,
)
from engine.types.requests import GenerationRequest, PreparedRequest

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"
)
SCHEMA = {"type": "object", "properties": {"aa": {"type": "integer"}, "bb": {"enum": ["xyxyxyxy", "zz"]}}}
TOOLS = (Tool("look_up", "Looks up.", {"type": "object", "properties": {"name": {"type": "string"}}}),)
FORMS: dict[str, dict[str, Any]] = {
    "free": {},
    "greedy": {"temperature": 0.0},
    "filters": {"temperature": 0.7, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
    "penalties": {"frequency_penalty": 0.4, "presence_penalty": -0.3, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {70: 6.0, 71: -100.0}, "min_tokens": 12},
    "choices": {"n": 3},
    "stop": {"stop": ["a", "e "], "ignore_eos": False, "thinking_budget": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "logprobs_mode": "processed"},
    "thoughts": {"thinking_budget": 7},
    "thoughts told": {"thinking_budget": 7, "logprobs": True, "n": 2},
    "form": {"constraint": Constraint("json", SCHEMA), "thinking_budget": 3},
    "form told": {"constraint": Constraint("json", SCHEMA), "logprobs": True, "thinking_budget": 5},
    "expression": {
        "constraint": Constraint("regex", "(ab|cd){3,20}"),
        "n": 2,
        "temperature": 1.5,
        "thinking_budget": 2,
    },
    "tool": {"tools": TOOLS, "tool_choice": ToolChoice("required"), "thinking_budget": 4},
}


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """The same model without and with drafts of its own."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    how: dict[str, Any] = {"cache_size": "32MiB", "context_length": 512, "chat_template": str(template)}
    return LLM(folder, **how), LLM(folder, speculation="ngram", **how)


def prepared(llm: LLM, form: dict[str, Any], **more: Any) -> PreparedRequest:
    given = {"max_tokens": 60, "seed": 3, "ignore_eos": True, **form}
    request = llm.request([ChatMessage("user", "ab ab ab ab cd")], **given)
    return dataclasses.replace(llm.engine.prepare(dataclasses.replace(request, record=True)), **more)


def run(llm: LLM, *requests: PreparedRequest) -> tuple[list[list[RequestOutput]], int]:
    """The outputs of each request, which share the steps, and how many steps it took."""
    before = llm.engine.stats().steps
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
    return list(outputs.values()), llm.engine.stats().steps - before


def reply(outputs: list[RequestOutput]) -> list[dict[str, Any]]:
    """Everything that a reply holds, by choice."""
    deltas = [delta for output in outputs for delta in output.deltas]
    found = []
    for index in sorted({delta.index for delta in deltas}):
        mine = [delta for delta in deltas if delta.index == index]
        found.append({
            "tokens": tuple(token for d in mine for token in d.token_ids),
            "text": "".join(d.text for d in mine),
            "reasoning": "".join(d.reasoning for d in mine),
            "calls": [call for d in mine for call in d.tool_calls],
            "logprobs": [entry for d in mine for entry in d.logprobs or ()],
            "scores": [score for d in mine for score in d.scores],
            "finish": mine[-1].finish_reason,
        })  # fmt: skip
    return found


@pytest.mark.parametrize("name", FORMS)
def test_no_draft_changes_a_reply(models: tuple[LLM, LLM], name: str) -> None:
    plain, drafting = models
    form = FORMS[name]
    [outputs], steps = run(plain, prepared(plain, form))
    expected = reply(outputs)
    assert len(expected) == form.get("n", 1)
    assert all(len(choice["scores"]) >= 1 for choice in expected)
    right = expected[0]["tokens"]
    rng = random.Random(name)
    drafts = {
        "right": right,
        "wrong": tuple(rng.randrange(400) for _ in right),
        "changed": tuple(t if rng.random() < 0.9 else rng.randrange(400) for t in right),
        "cut": right[: len(right) // 2],
        "shifted": (*right[:9], 5, 6, *right[9:]),
        "too long": right + right,
    }
    took = {}
    for how, tokens in drafts.items():
        for llm in (plain, drafting):
            [outputs], took[how] = run(llm, prepared(llm, form, prediction=tokens))
            assert reply(outputs) == expected, how
    [outputs], _ = run(drafting, prepared(drafting, form))
    assert reply(outputs) == expected, "with what came earlier in the text as drafts"
    if len(right) > 20 and form.get("n", 1) == 1:
        assert took["right"] < 0.5 * steps


@pytest.mark.parametrize("name", FORMS)
def test_a_reply_that_is_checked_is_read_and_not_generated(models: tuple[LLM, LLM], name: str) -> None:
    plain, _ = models
    form = FORMS[name]
    [outputs], steps = run(plain, prepared(plain, form))
    expected = reply(outputs)
    follow = tuple(choice["tokens"] for choice in expected)
    [outputs], took = run(plain, prepared(plain, form, follow=follow))
    deltas = [delta for output in outputs for delta in output.deltas]
    assert not any(delta.goes_on for delta in deltas)
    for choice, found in zip(expected, reply(outputs), strict=True):
        assert {**found, "logprobs": []} == {**choice, "logprobs": []}
    checks = [check for index in range(len(follow)) for d in deltas if d.index == index for check in d.checks]
    assert all(check.drawn == check.expected and check.closeness == 0.0 for check in checks)
    scores = [score for choice in expected for score in choice["scores"]]
    assert [(check.logprob, check.perturbed) for check in checks] == scores
    if min(len(tokens) for tokens in follow) > 20:
        assert took < 0.5 * steps


@pytest.mark.parametrize("name", ["free", "greedy", "filters", "penalties", "choices", "thoughts", "logprobs"])
def test_a_changed_token_is_found_and_the_check_goes_on(models: tuple[LLM, LLM], name: str) -> None:
    plain, _ = models
    form = FORMS[name]
    [outputs], _ = run(plain, prepared(plain, form))
    tokens = [choice["tokens"] for choice in reply(outputs)]
    changed = list(tokens[-1])
    place = 20
    changed[place] = 70 if changed[place] != 70 else 72
    follow = (*tokens[:-1], tuple(changed))
    [outputs], _ = run(plain, prepared(plain, form, follow=follow))
    checks = [check for o in outputs for d in o.deltas if d.index == len(tokens) - 1 for check in d.checks]
    at = next(i for i, check in enumerate(checks) if check.drawn != check.expected)
    assert checks[at].expected == changed[place]
    assert checks[at].drawn == tokens[-1][place]
    assert checks[at].closeness > 0
    assert len(checks) > at + 20, "what stands behind it is checked, too"


def test_a_reply_that_ends_too_soon_or_too_late_is_told(models: tuple[LLM, LLM]) -> None:
    plain, _ = models
    form = FORMS["expression"] | {"n": 1, "max_tokens": 120}
    [outputs], _ = run(plain, prepared(plain, form))
    [choice] = reply(outputs)
    [outputs], _ = run(plain, prepared(plain, form, follow=(choice["tokens"][:-2],)))
    assert outputs[-1].deltas[-1].goes_on
    [outputs], _ = run(plain, prepared(plain, form, follow=((*choice["tokens"], 70, 70),)))
    assert reply(outputs)[0]["tokens"] == choice["tokens"], "it ends where its grammar does"


def test_a_token_that_a_grammar_forbids_ends_the_check(models: tuple[LLM, LLM]) -> None:
    plain, _ = models
    form = FORMS["expression"] | {"n": 1}
    [outputs], _ = run(plain, prepared(plain, form))
    tokens = list(reply(outputs)[0]["tokens"])
    tokens[-3] = 3
    [outputs], _ = run(plain, prepared(plain, form, follow=(tuple(tokens),)))
    last = outputs[-1].deltas[-1]
    assert last.goes_on
    assert (last.checks[-1].expected, last.checks[-1].closeness) == (3, math.inf)


def test_checks_share_steps_with_others_in_a_cache_that_is_too_small(models: tuple[LLM, LLM]) -> None:
    plain, drafting = models
    names = [name for name in FORMS if name != "choices"]
    alone = {name: reply(run(plain, prepared(plain, FORMS[name]))[0][0]) for name in names}
    pool = drafting.engine.model.scheduler.pool
    hog = pool.allocate(pool.num_free - 24, "a hog")
    before = drafting.engine.model.scheduler.num_preemptions
    requests = []
    for name in names:
        follow = tuple(choice["tokens"] for choice in alone[name])
        requests.append(prepared(drafting, FORMS[name]))
        requests.append(prepared(drafting, FORMS[name], follow=follow))
        requests.append(prepared(drafting, FORMS[name], prediction=follow[0]))
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        drafting.engine.add(request)
    while drafting.engine.has_work:
        for output in drafting.engine.step():
            outputs[output.request_id].append(output)
        pool.check()
    pool.release(hog, "a hog")
    for i, request in enumerate(requests):
        found, expected = reply(outputs[request.request_id]), alone[names[i // 3]]
        for one, other in zip(found, expected, strict=True):
            assert {**one, "logprobs": []} == {**other, "logprobs": []}, names[i // 3]
    assert drafting.engine.model.scheduler.num_preemptions > before


def test_what_of_a_prediction_was_accepted_depends_on_the_texts_alone(models: tuple[LLM, LLM]) -> None:
    plain, drafting = models
    [outputs], _ = run(plain, prepared(plain, {}))
    tokens = reply(outputs)[0]["tokens"]
    predicted = (*tokens[:20], 5, *tokens[21:40])
    usages = set()
    for llm in models:
        for rows in (1, 4, 512):
            llm.engine.model.scheduler.max_rows = rows
            [outputs], _ = run(llm, prepared(llm, {}, prediction=predicted))
            usage = outputs[-1].usage
            usages.add((usage.accepted_prediction_tokens, usage.rejected_prediction_tokens))
    assert usages == {(39, 1)}
    del drafting


@pytest.mark.parametrize("name", ["free", "greedy", "filters", "form"])
def test_margins_tell_how_far_the_second_best_was(models: tuple[LLM, LLM], name: str) -> None:
    plain, _ = models
    form = {**FORMS[name], "margins": True}
    [outputs], _ = run(plain, prepared(plain, form))
    deltas = [delta for output in outputs for delta in output.deltas]
    for delta in deltas:
        assert delta.margins is not None
        assert len(delta.margins) == len(delta.token_ids)
    values = [value for delta in deltas for value in delta.margins or () if value is not None]
    assert values
    assert all(value >= 0 for value in values)
    [again], _ = run(plain, prepared(plain, form, prediction=reply(outputs)[0]["tokens"]))
    assert [value for o in again for d in o.deltas for value in d.margins or ()] == [
        value for d in deltas for value in d.margins or ()
    ]


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("more", [{}, {"n": 3}, {"max_tokens": 0}, {"max_tokens": 0, "n": 2}])
def test_prompt_logprobs_are_those_of_one_plain_pass(models: tuple[LLM, LLM], rows: int, more: dict[str, Any]) -> None:
    """Whatever chunks, whatever is in the prefix cache: against the logits of one pass over the whole prompt."""
    plain, _ = models
    prompt = "the same beginning and then something else. " * 3
    plain.generate(prompt, max_tokens=1, seed=1)  # so that all of it is in the prefix cache
    plain.engine.model.scheduler.max_rows = rows
    request = GenerationRequest(
        request_id="scored", prompt=prompt, sampling={"max_tokens": 3, "seed": 1, "prompt_logprobs": 2, **more}
    )
    made = plain.engine.prepare(request)
    [outputs], _ = run(plain, made)
    told = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    assert len(told) == 1, "once"
    [entries] = told
    assert len(entries) == len(made.prompt_token_ids)
    assert entries[0] is None
    plain.engine.model.scheduler.max_rows = 512
    [whole], _ = run(plain, dataclasses.replace(made, request_id="whole"))
    assert whole[0].prompt_logprobs == entries, "the same bits in one piece"
    for position, entry in enumerate(entries[1:], 1):
        assert entry is not None
        assert entry.token_id == made.prompt_token_ids[position]
        assert (entry.rank == 1) == (entry.top[0].token_id == entry.token_id)
        assert entry.top[0].logprob >= entry.top[1].logprob
        assert entry.logprob <= 0
    if more.get("max_tokens") == 0:
        assert [d.finish_reason for d in outputs[-1].deltas] == ["length"] * more.get("n", 1)
        assert outputs[-1].usage.completion_tokens == 0
    # The likelihood of a prompt's token is that of the same token when it is generated.
    cut = len(made.prompt_token_ids) - 1
    [shorter], _ = run(
        plain,
        dataclasses.replace(
            made,
            request_id="shorter",
            prompt_token_ids=made.prompt_token_ids[:cut],
            params=dataclasses.replace(made.params, prompt_logprobs=None, max_tokens=1, n=1, temperature=0.0),
            follow=((made.prompt_token_ids[cut],),),
        ),
    )
    [check] = shorter[-1].deltas[-1].checks
    last = entries[-1]
    assert last is not None
    assert check.logprob == pytest.approx(last.logprob, abs=1e-6)


def with_draws(outputs: list[RequestOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for delta in output.deltas for token in delta.token_ids)


@pytest.mark.parametrize("follows", [False, True])
def test_a_grammar_that_turns_slow_behind_a_right_draft_is_waited_for(
    models: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch, follows: bool
) -> None:
    """Whether a mask counts as slow is a matter of the clock, so a busy machine must not stop a reply."""
    plain, _ = models
    form = FORMS["expression"] | {"n": 1}
    [outputs], _ = run(plain, prepared(plain, form))
    tokens = reply(outputs)[0]["tokens"]
    calls, compute = 0, plain.engine.model.grammars.masks

    def slow(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            time.sleep(0.05)
        return compute(*arguments)

    monkeypatch.setattr(plain.engine.model.grammars, "masks", slow)
    more: dict[str, Any] = {"follow": (tokens,)} if follows else {"prediction": tokens}
    plain.engine.add(prepared(plain, form, **more))
    found: list[RequestOutput] = []
    for _ in range(200):
        found += plain.engine.step()
    assert not plain.engine.has_work, "it waits for ever"
    assert with_draws(found) == tokens


def test_memory_that_runs_out_between_the_draws_of_a_draft_loses_nothing(
    models: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = models
    form = FORMS["expression"] | {"n": 1}
    [outputs], _ = run(plain, prepared(plain, form))
    tokens = reply(outputs)[0]["tokens"]
    calls, start = 0, plain.engine._sampler.start

    def fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (4, 9):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(*arguments)

    monkeypatch.setattr(plain.engine._sampler, "start", fails)
    [found], _ = run(plain, prepared(plain, form, prediction=tokens))
    assert with_draws(found) == tokens
    assert calls > 9


def test_a_step_that_does_not_fit_is_tried_without_drafts_first(
    models: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = models
    [outputs], _ = run(plain, prepared(plain, {}))
    tokens = with_draws(outputs)
    forward, scheduler = plain.engine.model.runner.forward, plain.engine.model.scheduler
    monkeypatch.setattr(scheduler, "max_rows", scheduler.max_rows)

    def tight(schedule: Any) -> Any:
        if sum(chunk.num_rows for chunk in schedule.chunks) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(schedule)

    monkeypatch.setattr(plain.engine.model.runner, "forward", tight)
    [found], steps = run(plain, prepared(plain, {}, prediction=tokens))
    assert with_draws(found) == tokens
    assert steps < 30, "with fewer rows there are still drafts"


def test_a_fault_behind_right_draft_tokens_comes_after_them(
    models: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client gets before an error does not depend on drafts."""
    plain, _ = models
    [outputs], _ = run(plain, prepared(plain, {}))
    tokens = with_draws(outputs)
    start = plain.engine._sampler.start

    def faulty(logits: Any, rows: Any, *more: Any) -> Any:
        drawing, broken = start(logits, rows, *more), [row.position == 30 for row in rows]
        finish = drawing.finish

        def late() -> list[Any]:
            faults = (NumericalFault("not finite") if fault else None for fault in broken)
            return [fault or one for fault, one in zip(faults, finish(), strict=True)]

        monkeypatch.setattr(drawing, "finish", late)
        return drawing

    monkeypatch.setattr(plain.engine._sampler, "start", faulty)
    for prediction in ((), tokens):
        plain.engine.add(prepared(plain, {}, prediction=prediction))
        found: list[RequestOutput] = []
        while plain.engine.has_work:
            found += plain.engine.step()
        assert isinstance(found[-1].error, NumericalFault)
        assert with_draws(found) == tokens[:30]
        assert found[-1].usage.completion_tokens == 30


def test_the_next_turn_finds_as_much_of_a_reply_in_the_cache_whether_it_was_drafted_or_not(
    models: tuple[LLM, LLM],
) -> None:
    plain, _ = models
    found = set()
    for more in ({}, {"prediction"}, {"follow"}):
        request = prepared(plain, {})
        plain.engine.model.scheduler.pool.clear_cache()
        [outputs], _ = run(plain, request)
        tokens = with_draws(outputs)
        plain.engine.model.scheduler.pool.clear_cache()
        how: dict[str, Any] = {"prediction": tokens} if "prediction" in more else {"follow": (tokens,)} if more else {}
        run(plain, prepared(plain, {}, **how))
        again = dataclasses.replace(
            prepared(plain, {"max_tokens": 1}), prompt_token_ids=(*request.prompt_token_ids, *tokens, 70, 71)
        )
        [outputs], _ = run(plain, again)
        found.add(outputs[-1].usage.cached_tokens)
    assert len(found) == 1
    assert found.pop() > len(request.prompt_token_ids) + 50


@pytest.mark.parametrize("follow", [((),), ((1, 2), (3,)), ((10**6,),), ((-1,),), ((70,) * 61,)])
def test_a_reply_that_cannot_be_one_of_the_request_is_refused(
    models: tuple[LLM, LLM], follow: tuple[tuple[int, ...], ...]
) -> None:
    plain, _ = models
    with pytest.raises(ValueError, match="other choices, lengths or tokens"):
        plain.engine.add(prepared(plain, {}, follow=follow))
    assert not plain.engine.has_work


def test_a_wrong_draft_token_whose_row_of_the_embedding_is_damaged_harms_nobody(tiny: Callable[[str], Path]) -> None:
    llm = LLM(tiny("qwen3"), cache_size="32MiB", context_length=512)
    given = {"max_tokens": 20, "seed": 3, "ignore_eos": True}
    expected = llm.generate("ab ab", **given)[0].token_ids
    unused = next(t for t in range(300) if t not in expected)
    model = llm.engine.model.runner._model.model  # type: ignore[attr-defined]
    table = model.get_input_embeddings().weight.detach().clone()
    table[unused] = math.inf
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    request = llm.engine.prepare(llm.request("ab ab", **given))
    [found], _ = run(llm, dataclasses.replace(request, prediction=(*expected[:3], unused, *expected[4:])))
    assert with_draws(found) == expected


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_the_fallback_runner_checks_and_scores_by_decoding(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Where there are no drafts, a reply is checked and a prompt is scored all the same."""
    llm = LLM(tiny(family), context_length=256)
    assert not llm.engine.drafts
    given = {"max_tokens": 12, "seed": 3, "ignore_eos": True, "prompt_logprobs": 1, "n": 2}
    request = dataclasses.replace(llm.request("ab ab ab cd", **given), record=True)
    made = llm.engine.prepare(request)
    [outputs], _ = run(llm, made)
    expected = reply(outputs)
    [told] = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    assert [entry and entry.token_id for entry in told] == [None, *made.prompt_token_ids[1:]]
    follow = tuple(choice["tokens"] for choice in expected)
    again = dataclasses.replace(made, request_id="again", follow=follow)
    [outputs], _ = run(llm, again)
    checks = [check for index in range(2) for o in outputs for d in o.deltas if d.index == index for check in d.checks]
    assert all(check.drawn == check.expected for check in checks)
    assert [(c.logprob, c.perturbed) for c in checks] == [score for choice in expected for score in choice["scores"]]
    monkeypatch.setattr(preparation, "_MOST_LOGITS", 4 * llm.info.vocab_size)
    with pytest.raises(InvalidParameter, match="scores prompts of up to 4 tokens"):
        llm.engine.prepare(request)

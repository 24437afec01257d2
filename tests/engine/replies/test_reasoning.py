"""Thoughts and answers: told apart in any cut, bounded by a budget, no place for stop strings, free of the grammar."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from engine import LLM, ChatMessage, Constraint, InvalidParameter, Unsupported
from engine.replies.reasoning import ReasoningFormat, Splitter, find_reasoning_format, template_variables
from engine.templates.chat_template import ChatTemplate

THINK = ReasoningFormat("<think>", "</think>", "\n</think>\n\n")
CHANNELS = ReasoningFormat("<|a|>", "<|e|><|f|>", "<|e|><|f|>", answer_open="<|f|>")
HELLO = [ChatMessage("user", "Hello")]

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
OPENED = TURNS + "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
SWITCHED = (
    TURNS + "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SHOWN = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def split(found: ReasoningFormat, pieces: list[str], *, opened: bool = False) -> tuple[str, str]:
    splitter = Splitter(found, opened=opened)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    return "".join(p[0] for p in parts), "".join(p[1] for p in parts)


@pytest.mark.parametrize(
    ("found", "opened", "text", "thoughts", "answer"),
    [
        (THINK, False, "<think>\nhm\n</think>\n\nHi.", "hm", "Hi."),
        (THINK, False, "\n<think>hm</think>Hi.", "hm", "Hi."),
        (THINK, True, "hm\n\nso\n</think>\n\nHi.", "hm\n\nso", "Hi."),
        (THINK, False, "Hi. <think>no</think>", "", "Hi. <think>no</think>"),
        (THINK, False, "  Hi.\n", "", "  Hi.\n"),
        (THINK, False, "<think></think>Hi.", "", "Hi."),
        (THINK, True, "</think>Hi.", "", "Hi."),
        (THINK, True, "cut off", "cut off", ""),
        (THINK, True, "cut off </thi", "cut off </thi", ""),
        (THINK, True, "a < b </think><think>x", "a < b", "<think>x"),
        (THINK, False, "<thin", "", "<thin"),
        (THINK, False, "", "", ""),
        (CHANNELS, False, "<|a|>hm<|e|><|f|>Hi.", "hm", "Hi."),
        (CHANNELS, False, "<|f|>Hi.", "", "Hi."),
    ],
)
def test_what_is_thought_and_what_is_said(
    found: ReasoningFormat, opened: bool, text: str, thoughts: str, answer: str
) -> None:
    assert split(found, [text], opened=opened) == (thoughts, answer)
    assert split(found, list(text), opened=opened) == (thoughts, answer)


PARTS = st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a", "b c", "</thin", "</", "<|f|>"])


@given(
    text=st.lists(PARTS, max_size=12).map("".join), cuts=st.sets(st.integers(1, 60), max_size=8), opened=st.booleans()
)
def test_a_cut_changes_nothing(text: str, cuts: set[int], opened: bool) -> None:
    places = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert split(THINK, pieces, opened=opened) == split(THINK, [text], opened=opened)


@given(thoughts=st.text("ab <>/\n", max_size=20), answer=st.text("ab <>/\n", max_size=20))
def test_nothing_but_delimiters_and_white_space_is_lost(thoughts: str, answer: str) -> None:
    if "</think>" not in thoughts:
        text = f"<think>\n{thoughts}\n</think>\n\n{answer}"
        assert split(THINK, [text]) == (thoughts.strip(), answer.lstrip())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (TURNS, None),
        (OPENED, None),  # no closing delimiter anywhere: nothing is known of an end
        (OPENED + "{# </think> #}", THINK),
        (SWITCHED, THINK),
        (SHOWN, ReasoningFormat("[THINK]", "[/THINK]", "[/THINK]")),
        (SHOWN.replace("<assistant>", "<assistant>[THINK]"), ReasoningFormat("[THINK]", "[/THINK]", "[/THINK]")),
    ],
)
def test_the_delimiters_are_read_off_the_template(source: str, found: ReasoningFormat | None) -> None:
    assert find_reasoning_format(ChatTemplate(source)) == found


FAMILIES = {
    "GLM-4.6": ("<think>", "</think>", {"enable_thinking": False}),
    "SmolLM3": ("<think>", "</think>", {"enable_thinking": False}),
    "Qwen3-0.6B": ("<think>", "</think>", {"enable_thinking": False}),
    "DeepSeek-R1": ("<think>", "</think>", {"enable_thinking": False}),
    "DeepSeek-V3.1": ("<think>", "</think>", {"enable_thinking": False, "thinking": False}),
    "granite": ("<think>", "</think>", {"thinking": False}),
    "gpt-oss": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        {"reasoning_effort": "low"},
    ),
    **dict.fromkeys(("Hermes", "Qwen2.5", "Qwen3-Coder", "gemma", "meta-llama", "Phi-3.5", "Mistral"), None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_people_run(shared: Path, family: str) -> None:
    [file] = (shared / "chat_templates").glob(f"*{family}*")
    template = ChatTemplate(file.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
    found, expected = find_reasoning_format(template), FAMILIES[family]
    assert (found is None) == (expected is None)
    if found and expected:
        assert (found.open, found.close) == expected[:2]
        assert template_variables(template, found, "minimal") == expected[2]


def test_an_effort_that_nothing_can_express() -> None:
    plain, opened = ChatTemplate(TURNS), ChatTemplate(OPENED + "{# </think> #}")
    assert template_variables(plain, None, "high") is None
    assert template_variables(plain, None, "none") is None
    assert template_variables(opened, THINK, "high") is None
    with pytest.raises(InvalidParameter, match="always thinks"):
        template_variables(opened, THINK, "none")
    with pytest.raises(InvalidParameter, match="'max'"):
        template_variables(plain, None, "max")


# -- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def thinker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    template = tmp_path_factory.mktemp("template") / "thinks.jinja"
    template.write_text(OPENED + "{# </think> #}")
    return LLM(folder, cache_size="32MiB", context_length=512, chat_template=template)


def test_a_budget_closes_the_thoughts(thinker: LLM) -> None:
    closing = list(thinker.engine.model.closing_ids)
    for budget in (0, 1, 7):
        [answer] = thinker.generate(HELLO, thinking_budget=budget, seed=1, max_tokens=60, ignore_eos=True)
        assert list(answer.token_ids[budget : budget + len(closing)]) == closing
        assert "</think>" not in answer.reasoning + answer.text
        assert budget < answer.usage.reasoning_tokens <= budget + len(closing)
        assert answer.usage.completion_tokens == 60
        assert answer.text
    [free] = thinker.generate(HELLO, seed=1, max_tokens=60, ignore_eos=True)
    assert (free.text, free.usage.reasoning_tokens) == ("", 60)
    assert free.reasoning


def test_a_budget_forces_the_same_with_logprobs_and_in_a_stream(thinker: LLM) -> None:
    fields: dict[str, Any] = {"thinking_budget": 5, "seed": 2, "max_tokens": 40, "ignore_eos": True}
    [fast] = thinker.generate(HELLO, **fields)
    [slow] = thinker.generate(HELLO, logprobs=True, **fields)
    assert fast.token_ids == slow.token_ids
    assert len(slow.logprobs or ()) == 40
    assert (fast.text, fast.reasoning) == (slow.text, slow.reasoning)
    outputs = list(thinker.stream(HELLO, **fields))
    assert "".join(d.text for o in outputs for d in o.deltas) == fast.text
    assert "".join(d.reasoning for o in outputs for d in o.deltas) == fast.reasoning


def test_stop_strings_do_not_look_into_thoughts(thinker: LLM) -> None:
    fields: dict[str, Any] = {"thinking_budget": 12, "seed": 3, "max_tokens": 60, "ignore_eos": True}
    [free] = thinker.generate(HELLO, **fields)
    stop = next(c for c in free.text if c not in free.reasoning and c.isprintable())
    common = next(c for c in free.reasoning if c not in free.text and c.isprintable())
    [stopped] = thinker.generate(HELLO, stop=[stop, common], **fields)
    assert stopped.reasoning == free.reasoning
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_grammar_begins_after_the_thoughts(thinker: LLM) -> None:
    constraint = Constraint("json", {"enum": [{"a": 1}, {"b": 2}]})
    for seed in range(4):
        [answer] = thinker.generate(HELLO, constraint=constraint, thinking_budget=9, seed=seed, max_tokens=120)
        assert answer.finish_reason == "stop"
        assert answer.reasoning
        assert json.loads(answer.text) in ({"a": 1}, {"b": 2})
        [slow] = thinker.generate(
            HELLO, constraint=constraint, thinking_budget=9, seed=seed, max_tokens=120, logprobs=True
        )
        assert slow.token_ids == answer.token_ids


def test_a_bare_prompt_has_no_thoughts(thinker: LLM) -> None:
    [answer] = thinker.generate("<think>", seed=1, max_tokens=20, ignore_eos=True)
    assert (answer.reasoning, answer.usage.reasoning_tokens) == ("", 0)
    assert answer.text
    [answer] = thinker.generate("Hi", constraint=Constraint("choice", ["a"]), seed=1)
    assert answer.text == "a"


def test_earlier_thoughts_reach_the_template(folder: Path, tmp_path: Path) -> None:
    template = ChatTemplate(SHOWN)
    turns = [*HELLO, ChatMessage("assistant", "Hi.", reasoning_content="hm"), *HELLO]
    assert "[THINK]hm[/THINK]Hi." in template.render(turns)


def test_a_model_that_does_not_think(folder: Path) -> None:
    llm = LLM(folder, cache_size="32MiB", context_length=256)
    if llm.engine.model.chat_format.reasoning is not None:
        pytest.fail("the noise checkpoint's template must know of no thoughts")
    with pytest.raises(Unsupported, match="does not think"):
        llm.generate(HELLO, thinking_budget=3)

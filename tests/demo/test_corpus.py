"""The corpus that the demo model is trained and measured on: seeded, split for good, and right in what it teaches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from demo import corpus, facts, memory, tasks, tools, words
from demo.evaluate import CASES, Case, calls_in, question, right
from demo.exchange import Exchange, Split, split_of

DRAWN = [corpus.conversation(5, index) for index in range(400)]


def test_same_seed_and_index_same_conversation() -> None:
    assert [corpus.conversation(5, index) for index in range(50)] == DRAWN[:50]
    assert [corpus.conversation(6, index) for index in range(50)] != DRAWN[:50]


def test_no_combination_is_in_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a conversation, and in whatever style it is asked for."""
    trained: set[str] = set()
    allowed = corpus._allowed

    def spy(exchange: Exchange, split: Split) -> bool:
        good = allowed(exchange, split)
        if good and split == "train" and not exchange.free and not exchange.basic:
            trained.add(exchange.key)
        return good

    monkeypatch.setattr(corpus, "_allowed", spy)
    for index in range(1500):
        corpus.conversation(0, index)
    assert len(trained) > 1000
    assert all(split_of(key) == "train" for key in trained)
    for case in CASES:
        for index in range(8):
            held = corpus.conversation("evaluation", index, "test", case.last).exchange
            assert held
            assert held.free or split_of(held.key) == "test"
            assert held.key not in trained


@pytest.mark.parametrize("style", corpus.STYLES)
def test_a_style_does_not_make_another_combination(style: str) -> None:
    for index in range(30):
        held = corpus.conversation("evaluation", index, "test", style).exchange
        assert held
        assert held.key.split("|")[0] in ("sum", "talk", "docs", "tell", "recall", "unknown")


@pytest.mark.parametrize(("a", "b"), [(a, b) for a in range(0, 100, 7) for b in range(0, 100, 9)])
def test_worked_steps_end_in_the_result(a: int, b: int) -> None:
    steps = ((tasks.add_thought(a, b), a + b), (tasks.subtract_thought(a, b), a - b))
    for thought, result in (*steps, (tasks.multiply_thought(a, b % 9 + 1), a * (b % 9 + 1))):
        assert re.findall(r"-?\d+", thought)[-1] == str(result)
        for left, operation, right_, total in re.findall(r"(?:^|[.,] )(\d+) ([+*-]) (\d+) = (-?\d+)(?=[.,])", thought):
            x, y = int(left), int(right_)
            assert int(total) == {"+": x + y, "-": x - y, "*": x * y}[operation], thought


def test_arguments_of_calls_are_in_the_request_and_fit_the_definition() -> None:
    seen = 0
    for index in range(100):
        drawn = corpus.conversation(7, index, last="tool")
        functions = {tool["function"]["name"]: tool["function"]["parameters"] for tool in drawn.tools or []}
        assert drawn.exchange
        for call in drawn.exchange.calls:
            properties = functions[call.name]["properties"]
            assert set(functions[call.name].get("required", ())) <= set(call.arguments) <= set(properties)
            for name, value in call.arguments.items():
                assert str(value).lower() in drawn.exchange.user.lower()
                assert properties[name]["type"] == ("string" if isinstance(value, str) else properties[name]["type"])
                seen += 1
    assert seen > 100


def test_no_tool_fits_when_it_says_so() -> None:
    for index in range(60):
        drawn = corpus.conversation(8, index, last="no tool")
        if drawn.messages[-1]["content"] == tools.NO_TOOL:
            assert drawn.exchange
            assert not drawn.exchange.calls
            for tool in drawn.tools or []:
                verb_and_thing = set(re.findall(r"[a-z]+", re.sub("([A-Z])", r"_\1", tool["function"]["name"]).lower()))
                asked = set(re.findall(r"[a-z]+", drawn.messages[-2]["content"].lower()))
                assert not verb_and_thing <= asked


def test_tools_are_left_alone_where_none_is_needed() -> None:
    for index in range(60):
        drawn = corpus.conversation(8, index, last="beside tools", refusals=False)
        assert drawn.tools
        assert drawn.exchange
        assert not drawn.exchange.calls
        assert all(message["content"] != tools.NO_TOOL for message in drawn.messages)


def test_memory_answers_with_what_was_told_last() -> None:
    for index in range(60):
        drawn = corpus.conversation(9, index, last="recall")
        answer = drawn.messages[-1]["content"]
        if answer == memory.FORGETS:
            continue
        assert drawn.exchange
        assert drawn.exchange.short
        told = " ".join(m["content"] for m in drawn.messages[:-1] if m["role"] == "user")
        assert drawn.exchange.short.lower() in told.lower()


def test_every_skill_and_both_modes_are_drawn() -> None:
    skills = {drawn.skill for drawn in DRAWN}
    assert {"tool", "no tool", "recall", "tell", "addition", *corpus.SKILLS} <= skills
    assert any(drawn.thinking for drawn in DRAWN)


def test_thoughts_stand_only_where_they_are_asked_for() -> None:
    for drawn in DRAWN:
        assert any("reasoning_content" in message for message in drawn.messages) == drawn.thinking


def test_facts_have_names_of_their_own() -> None:
    topics = [topic for fact in facts.FACTS for topic in (*fact.topics, *fact.tasks)]
    assert len(set(topics)) == len(topics)
    assert len({fact.answer for fact in facts.FACTS}) == len(facts.FACTS)
    assert len(set(words.NAMES)) == len(words.NAMES)


@pytest.mark.parametrize(
    ("reply", "good"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', True),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "1"}}\n</tool_call>', False),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', False),
        ("None", False),
    ],
)
def test_the_judge_of_calls(reply: str, good: bool) -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    assert right(reply, {"content": "", "tool_calls": [call]}, Case("", "tool")) is good
    assert right(reply, {"content": ""}, Case("", "tool", no_call=True)) is ("<tool_call>" not in reply)


@pytest.mark.parametrize(
    ("reply", "calls"),
    [
        ("None", []),
        ('<tool_call>\n{"name": "f"}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>', ["f", "g"]),
        ('<tool_call>\n{"name": "f"\n</tool_call>', None),
        ('<tool_call>\n{"name": "f"}', None),
    ],
)
def test_calls_are_read_whole_or_not_at_all(reply: str, calls: list[str] | None) -> None:
    found = calls_in(reply)
    assert calls == (None if found is None else [call["name"] for call in found])


def test_the_question_ends_before_the_turn_that_is_judged() -> None:
    drawn = corpus.conversation(3, 1, last="tool")
    before, call = question(drawn, after_tool=False)
    after, answer = question(drawn, after_tool=True)
    assert before[-1]["role"] == "user"
    assert call["tool_calls"]
    assert after[-1]["role"] == "tool"
    assert "tool_calls" not in answer
    assert answer["content"]


def test_facts_name_what_is_there() -> None:
    """What the model tells people to type exists."""
    root = Path(__file__).resolve().parents[2]
    said = " ".join(fact.answer for fact in facts.FACTS)
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"[Rr]un make ([a-z-]+)", said)) == {"serve", "demo-model"}
    assert {"serve", "demo-model"} <= set(targets)
    reference = "".join(path.read_text(encoding="utf-8") for path in (root / "docs" / "reference").glob("*.md"))
    for name in (
        "max_completion_tokens",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "models check",
    ):
        assert name in said
        assert name in reference
    for path in re.findall(r"/(?:v1|health)/[a-z/]+", said):
        assert path.removeprefix("/v1") in reference

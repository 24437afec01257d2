"""The corpus that the demo model is trained and measured on: seeded, split for good, and right in what it teaches."""

from __future__ import annotations

import json
import re

import pytest

from demo import corpus, facts, tools, words
from demo.evaluate import CASES, calls_in, question, right

DRAWN = [corpus.conversation(5, index) for index in range(400)]


def test_same_seed_and_index_same_conversation() -> None:
    assert [corpus.conversation(5, index) for index in range(50)] == DRAWN[:50]
    assert [corpus.conversation(6, index) for index in range(50)] != DRAWN[:50]


def test_no_combination_is_in_both_splits() -> None:
    trained = {drawn.exchange.key for drawn in DRAWN if drawn.exchange and not drawn.exchange.free}
    assert all(corpus.split_of(key) == "train" for key in trained)
    for case in CASES:
        for index in range(8):
            held = corpus.conversation("evaluation", index, "test", case.last).exchange
            assert held
            assert corpus.split_of(held.key) == "test"
            assert held.key not in trained


@pytest.mark.parametrize(("a", "b"), [(a, b) for a in range(0, 100, 7) for b in range(0, 100, 9)])
def test_worked_steps_end_in_the_result(a: int, b: int) -> None:
    steps = ((corpus.add_thought(a, b), a + b), (corpus.subtract_thought(a, b), a - b))
    for thought, result in (*steps, (corpus.multiply_thought(a, b % 9 + 1), a * (b % 9 + 1))):
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
        if drawn.messages[-1]["content"] == corpus.NO_TOOL:
            assert drawn.exchange
            assert not drawn.exchange.calls
            for tool in drawn.tools or []:
                verb_and_thing = set(re.findall(r"[a-z]+", re.sub("([A-Z])", r"_\1", tool["function"]["name"]).lower()))
                asked = set(re.findall(r"[a-z]+", drawn.messages[-2]["content"].lower()))
                assert not verb_and_thing <= asked


def test_memory_answers_with_what_was_told_last() -> None:
    for index in range(60):
        drawn = corpus.conversation(9, index, last="recall")
        answer = drawn.messages[-1]["content"]
        if answer == corpus.FORGETS:
            continue
        assert drawn.exchange
        assert drawn.exchange.short
        told = " ".join(m["content"] for m in drawn.messages[:-2] if m["role"] == "user")
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
    assert right(reply, {"content": "", "tool_calls": [call]}) is good
    assert (calls_in(reply) is None) == ("1}\n" in reply and "1}}" not in reply)


def test_the_question_ends_before_the_turn_that_is_judged() -> None:
    drawn = corpus.conversation(3, 1, last="tool")
    before, call = question(drawn, after_tool=False)
    after, answer = question(drawn, after_tool=True)
    assert before[-1]["role"] == "user"
    assert call["tool_calls"]
    assert after[-1]["role"] == "tool"
    assert json.dumps(answer)
    assert isinstance(tools.VERBS, list)

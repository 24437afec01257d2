"""The evaluations: tasks are what their tables say, and the harnesses' numbers do not move."""

from __future__ import annotations

import collections
import json
from typing import Any

import pytest
import yaml

from benchmarks.report import Report
from evaluations import check, items, peers
from evaluations.clients import PYTHON, different, flat
from evaluations.harness import ANSWERS, FACTS

Lines = list[dict[str, Any]]


def lines(name: str) -> Lines:
    return [json.loads(line) for line in (items.TASKS / name).read_text(encoding="utf-8").splitlines()]


def test_the_items_are_what_the_tables_say() -> None:
    for name, content in items.files().items():
        assert (items.TASKS / name).read_text(encoding="utf-8") == content, "run: python -m evaluations.items"


def test_every_fact_has_one_right_choice_among_different_ones() -> None:
    facts = lines("facts.jsonl")
    assert len(facts) == len({fact["text"] for fact in facts}) == 120
    for fact in facts:
        assert len(set(fact["choices"])) == items.CHOICES, fact
    assert set(collections.Counter(fact["answer"] for fact in facts).values()) == {30}, "a place is favoured"


def test_no_question_is_among_the_examples() -> None:
    questions = [item["question"] for item in lines("answers.jsonl")]
    assert len(questions) == len(set(questions)) == 50
    assert not {item["question"] for item in lines("examples.jsonl")} & set(questions)


@pytest.mark.parametrize("name", [FACTS, ANSWERS])
def test_the_tasks_need_nothing_but_their_files(name: str) -> None:
    """A harness without a network finds everything here."""
    (task,) = [
        task for path in items.TASKS.glob("*.yaml") if (task := yaml.safe_load(path.read_text()))["task"] == name
    ]
    assert task["dataset_path"] == "json"
    for file in task["dataset_kwargs"]["data_files"].values():
        assert (check.ROOT / file).is_file()


def result(likelihoods: list[float]) -> dict[str, Any]:
    return {
        "scores": {FACTS: 1.0, ANSWERS: 1.0},
        "samples": {FACTS: [[[value, False] for value in likelihoods]], ANSWERS: [[str(likelihoods)]]},
    }


def test_one_bit_counts() -> None:
    one, other = result([-1.0, -2.0]), result([-1.0, -2.0000000000000004])
    assert flat(one, FACTS) == [[-1.0, False], [-2.0, False]]
    assert different(one, one, FACTS) == 0
    assert different(one, other, FACTS) == 1


def test_answers_that_are_missing_are_no_agreement() -> None:
    with pytest.raises(RuntimeError, match="2 answers, then 1"):
        different(result([-1.0, -2.0]), result([-1.0]), FACTS)


@pytest.mark.parametrize(
    ("likelihood", "wrong"),
    [(-1.0, []), (-1.00005, [ANSWERS]), (-1.001, [FACTS, ANSWERS])],
)
def test_transformers_own_numbers_are_met_up_to_rounding(likelihood: float, wrong: list[str]) -> None:
    one = {"one": result([-1.0])}
    found = check.Found(one, one, one)
    verdicts = [*check.verdicts(found, result([likelihood]))]
    assert [what.split("; ")[1] for what, _, as_promised in verdicts if not as_promised] == wrong


def test_a_run_that_differs_is_named() -> None:
    found = check.Found(
        {"one": result([-1.0]), "many": result([-1.5])}, {"one": result([-1.0])}, {"one": result([-1.0])}
    )
    wrong = [what for what, _, as_promised in check.verdicts(found, result([-1.0])) if not as_promised]
    assert wrong == [f"lm-eval, completions; many; {FACTS}", f"lm-eval, completions; many; {ANSWERS}"]


def test_the_comparison_counts_what_moves_and_leaves_out_what_was_not_asked() -> None:
    """A server without log-probabilities has no zero among them, which would look like a merit."""
    still = {name: {**result([-1.0, -2.0]), "seconds": 1.0} for name in peers.PASSES}
    moved = {**still, peers.CROWD: {**result([-1.0, -2.5]), "seconds": 0.5}}
    report = Report("evaluations", "tiny", "2026-01-31", "0", False, {}, {})
    peers.tell(report, [peers.Contestant("still", still, still, still), peers.Contestant("moved", {}, moved, {})])
    rows = {row.name: {name: values["median"] for name, values in row.values.items()} for row in report.rows}
    assert rows[f"answers in words that differ from {peers.ALONE}: {peers.CROWD}"] == {"still": 0, "moved": 1}
    assert rows[f"log-likelihoods that differ from {peers.ALONE}: {peers.CROWD}"] == {"still": 0}
    assert rows[f"time for all answers, {peers.CROWD}"] == {"still": 1.0, "moved": 0.5}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.exists(), reason="the harnesses are not installed: `make evaluations` does it")
def test_the_harnesses_numbers_do_not_move() -> None:
    """Two real clients on two processes, at 1, 8 and 32 requests at once, against transformers' own numbers."""
    told: list[str] = []
    assert check.check(check.parse(["--limit", "20"]), told.append), "\n".join(told)
    assert len(told) > 20

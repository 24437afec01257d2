"""Expressions of a response template that never end are refused before anybody waits for one; honest ones are not."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import LoadError
from engine.replies import expression_trial


def template(**call: Any) -> dict[str, Any]:
    return {"start_anchor": "A:", "fields": {"tool_calls": {"close": "</x>", **call}}}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (template(open_pattern="(?:a|b|ab)*c"), "took longer"),
        (template(open="<x>", content_args={"tag_pattern": r"<p>(?P<key>(?:\w|\w\w)*)</p>"}), "took longer"),
        (template(open="<x>", value_parser={"args": {"tag_pattern": r"<f=\w+>(?:\s|\s\s)*</f>"}}), "took longer"),
        (template(open_pattern="((a{1000}){1000}){1000}"), "memory|took longer"),
        ({"start_anchor_pattern": "(?:x|xx)*y", "fields": {"content": {}}}, "took longer"),
    ],
)
def test_an_expression_that_never_ends_is_refused(
    source: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expression_trial, "SECONDS", 1.0)
    with pytest.raises(LoadError, match=why) as refused:
        expression_trial.check(source)
    assert "models.yaml" in str(refused.value)


def test_honest_expressions_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fifth of the time: those whose time grows with the cube of a text's length are honest, too."""
    monkeypatch.setattr(expression_trial, "SECONDS", 1.0)
    tags = r"<parameter=(?P<key>\w+)>\s*(?P<value>.*?)\s*</parameter>"
    for expression in (tags, r"<tool_call>\s*<function=(?P<name>\w+)>", r"(?:^|<think>\s*)", "foo[^<]*z|bar", "(", ""):
        expression_trial.check(template(open_pattern=expression))
    expression_trial.check(None)
    expression_trial.check(template(open="<x>", content_args=[]))

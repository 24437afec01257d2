"""Right or refused: every architecture of the installed transformers, as a tiny model, through the whole engine.

The popular ones are examined in every run of the suite, the others by `pytest -m sweep`. What is asked of each is the
same: if it loads, its tokens are transformers' own; if the law is claimed, it is found; if it is refused, that was
expected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from few_rows import WHY, few_rows_keep_their_bits
from zoo.examine import Case, Finding
from zoo.expected import ANYWHERE, HEARD, LAWFUL, NOT_BUILT, POPULAR, REFUSED
from zoo.sweep import Sweep
from zoo.tiny import NAMES

Findings = dict[Case, Future[Finding]]


def _case(name: str, *, kernels: bool = True) -> object:
    marks = pytest.mark.slow if name in POPULAR else pytest.mark.sweep
    return pytest.param(
        Case(name, kernels, thorough=False), marks=marks, id=name + ("" if kernels else " without kernels")
    )


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> Iterator[Findings]:
    """Starts to examine all cases that were selected, in the background: each test waits for its own."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [given["case"] for given in parameters if isinstance(given.get("case"), Case)]
    with Sweep(list(dict.fromkeys(cases))) as sweep:
        yield sweep.findings


@pytest.mark.parametrize("case", [_case(name) for name in NAMES])
def test_right_or_refused(case: Case, findings: Findings) -> None:
    found = findings[case].result()
    if found.status == "not built":
        assert re.search(NOT_BUILT.get(case.name, "(unexpected)"), found.reason), found.reason
        return
    if found.status == "refused":
        assert re.search(REFUSED.get(case.name, "(unexpected)"), found.reason), found.reason
        assert re.fullmatch(r"[^\n]*\.", found.reason), f"not one sentence: {found.reason!r}"
        return
    assert found.served, found.reason
    assert found.right, (found.runner, found.wrong, found.reason)
    assert found.lawful or not found.claimed, found.differ
    assert case.name not in REFUSED, "it is served now: take it out of the table"
    assert found.lively >= 0.1, "its tokens say too little of the context: this test would not see a lost past"
    strange = [warning for warning in found.warnings if not warning.startswith(HEARD)]
    assert not strange


@pytest.mark.parametrize("case", [*map(_case, LAWFUL), *(_case(name, kernels=False) for name in ANYWHERE)])
def test_the_popular_ones_are_packed_and_lawful(case: Case, findings: Findings) -> None:
    found = findings[case].result()
    assert found.right, (found.wrong, found.reason)
    if case.name == "gpt_oss" and not case.kernels and not few_rows_keep_their_bits():
        assert (found.runner, found.claimed) == ("packed", False), f"{WHY}, so the law must not be claimed"
        return
    assert (found.runner, found.claimed, found.lawful) == ("packed", True, True), (found.reason, found.differ)

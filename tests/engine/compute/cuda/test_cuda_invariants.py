"""The engine's law over the whole CUDA path: the table of `test_invariants.py`, computed by the kernels' reference.

Steps are replayed from recordings, as on a GPU, unless a circumstance says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_invariants
from on_reference import reference_backend
from test_invariants import CIRCUMSTANCES, PROMPTS, Bits, Kept, alone, open_model

from engine.compute.cuda.runner import CudaRunner


def without_graphs(folder: Path, prompt: str) -> Bits:
    with reference_backend():
        llm = open_model(folder)
        runner = llm.engine.model.runner
        assert isinstance(runner, CudaRunner)
        assert runner.graphs == 0
        return test_invariants.run(llm, prompt)


ALL: dict[str, Callable[[Path, str], Bits]] = {
    **{name: circumstance for name, circumstance in CIRCUMSTANCES.items() if name != "a new process"},
    "without graphs": without_graphs,
}
"""A new process would compute without the reference: the CUDA path is chosen for this one only."""


@pytest.fixture(autouse=True, scope="module")
def _reference() -> Iterator[None]:
    with reference_backend(records=True):
        yield


@pytest.fixture(scope="module")
def baseline(tiny: Callable[[str], Path], _reference: None) -> Callable[[str, str], Bits]:
    known: dict[tuple[str, str], Bits] = {}

    def get(family: str, prompt: str) -> Bits:
        if (family, prompt) not in known:
            known[family, prompt] = alone(tiny(family), PROMPTS[prompt])
        return known[family, prompt]

    return get


@pytest.fixture(scope="module")
def kept(_reference: None) -> Kept:
    return Kept(open_model)


QUICK = ("in a crowd of 16",)


@pytest.mark.parametrize(
    ("family", "prompt"),
    [("qwen3", "short"), *(pytest.param("gemma3_text", text, marks=pytest.mark.sweep) for text in PROMPTS)],
)
@pytest.mark.parametrize(
    "circumstance", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_the_circumstance_does_not_matter_on_the_cuda_path(
    circumstance: str,
    family: str,
    prompt: str,
    tiny: Callable[[str], Path],
    baseline: Callable[[str, str], Bits],
    kept: Kept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = baseline(family, prompt)
    monkeypatch.setattr(test_invariants, "open_model", kept)
    assert ALL[circumstance](tiny(family), PROMPTS[prompt]) == right


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text", "phi3", "gemma2", "mistral", "gpt2"])
def test_families_are_packed_on_the_cuda_path(family: str, tiny: Callable[[str], Path]) -> None:
    """The self-test has compared them with plain transformers, and found the same bits packed and in chunks."""
    llm = open_model(tiny(family))
    assert (llm.info.runner, llm.info.linear, llm.info.law.holds) == ("packed", "triton", True), llm.info.law
    runner: Any = llm.engine.model.runner
    assert runner.graphs == 5, "steps of up to 16 rows"

"""What the host waits for in a step on a GPU: one read, after everything was launched. Counted on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from on_reference import reference_backend
from sync_counter import SyncCounter

from engine import LLM, Constraint
from engine.compute.cuda.steps.lookahead import CudaLookahead
from engine.sampling.transfer import HostCopy

CROWDS: dict[str, list[dict[str, Any]]] = {
    "one": [{}],
    "greedy": [{"temperature": 0}] * 3,
    "mixed": [
        {"top_k": 20},
        {"top_p": 0.3},
        {"min_p": 0.1, "logprobs": True, "top_logprobs": 3},
        {"temperature": 0, "frequency_penalty": 0.5, "logit_bias": {70: 2.0}},
    ],
    "a grammar": [{"constraint": Constraint("regex", "[a-z ]{40}")}, {}],
    "choices": [{"n": 3}],
}


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path]) -> Iterator[LLM]:
    with reference_backend(records=True):
        yield LLM(tiny("qwen3"), context_length=512, cache_size="16MiB", max_sequences=6)


@pytest.mark.parametrize("crowd", CROWDS)
def test_a_step_waits_once(crowd: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(HostCopy, "__init__", _noted(happened, "start", HostCopy.__init__))
    monkeypatch.setattr(HostCopy, "read", _noted(happened, "read", HostCopy.read))
    monkeypatch.setattr(CudaLookahead, "launch", _noted(happened, "launch", CudaLookahead.launch))
    names = [
        llm.add("the bits of a reply", **{"max_tokens": 30, "ignore_eos": True, "seed": 3, **p}) for p in CROWDS[crowd]
    ]
    for _ in range(6):
        llm.engine.step()
    waited = []
    for _ in range(8):
        happened.clear()
        with SyncCounter() as seen:
            llm.engine.step()
        reads = [read for read in seen.reads if "reference.py" not in read]
        assert all("transfer.py" in read for read in reads), reads
        # Which rows are finite was on its way before the answers were, and so has arrived when they have.
        assert happened.index("read") > happened.index("start")
        assert happened.count("start") == happened.count("read") <= 2, happened
        assert "start" not in happened[happened.index("read") :], "nothing more is asked for after the wait"
        assert "launch" not in happened[happened.index("read") :], "the next step was launched before the wait"
        waited.append(happened.count("launch"))
    assert sum(waited) >= 7, "nearly every step launches the next one"
    for prepared in names:
        llm.engine.abort(prepared.request_id)


def _noted(happened: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        happened.append(name)
        return function(*args, **kwargs)

    return call

"""With a compiler and without one, a served model keeps its law: tried by replies, not by what the start says."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import LLM, ensure_noise_checkpoint
from engine.compute.cpu.kernels import Kernels, NoKernels
from engine.llm import Completion

DEMO = Path(__file__).resolve().parents[3] / "demo" / "model"
PROMPTS = ["Hello", "What is three plus four?", "word after word " * 20, "é – 你好"]


def _bits(completion: Completion) -> list[tuple[int, str]]:
    return [(entry.token_id, entry.logprob.hex()) for entry in completion.logprobs or ()]


@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
@pytest.mark.parametrize("model", ["noise", "demo"])
def test_a_start_with_and_without_a_compiler_serves_the_law(
    model: str, compiler: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the byte tokenizer of the noise checkpoint and on the merged one of the demo model."""
    if compiler:
        try:
            Kernels.load()
        except NoKernels as error:
            pytest.skip(f"no compiled kernels on this machine: {error}")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    llm = LLM(DEMO if model == "demo" else ensure_noise_checkpoint(), context_length=512, cache_size="64MiB")
    assert llm.info.law.holds, llm.info.law.reason
    assert (llm.info.linear == "native") == compiler
    params = {"max_tokens": 16, "temperature": 0.8, "seed": 3, "logprobs": True}
    together = [_bits(reply) for [reply] in llm.generate_many(PROMPTS, **params)]
    alone = [_bits(reply) for [reply] in (llm.generate(prompt, **params) for prompt in PROMPTS)]
    assert together == alone
    assert all(together), "every prompt is answered"

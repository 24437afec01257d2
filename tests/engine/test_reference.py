"""Greedy tokens and raw logprobs equal plain transformers in float32; every family, through the real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import LLM
from engine.compute.cpu.stored_linear import StoredEmbedding

PROMPT = "the same seed with the same request gives the same words again, alone or in a crowd, " * 2
LONG = PROMPT * 14  # more than one key span
RUNNERS = {"bloom": "fallback", "mamba": "fallback"}


def _plain(folder: Path, prompt: str, count: int) -> tuple[list[int], list[float]]:
    """Greedy continuation, token by token, without any cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    tokens, logprobs = [], []
    with torch.inference_mode():
        for _ in range(count):
            row = model(torch.tensor([[*ids, *tokens]]), use_cache=False).logits[0, -1].log_softmax(-1)
            tokens.append(int(row[:440].argmax()))
            logprobs.append(float(row[tokens[-1]]))
    return tokens, logprobs


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_greedy_tokens_and_raw_logprobs(family: str, tiny: Callable[[str], Path]) -> None:
    folder = tiny(family)
    tokens, logprobs = _plain(folder, PROMPT, 8)
    llm = LLM(folder)
    [answer] = llm.generate(PROMPT, temperature=0, max_tokens=8, logprobs=True, ignore_eos=True)
    assert llm.info.runner == RUNNERS.get(family, "packed"), llm.info.law
    assert list(answer.token_ids) == tokens
    assert [e.logprob for e in answer.logprobs or ()] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma2", "gpt_oss"])
def test_past_the_first_key_span(family: str, tiny: Callable[[str], Path]) -> None:
    tokens, logprobs = _plain(tiny(family), LONG, 3)
    [answer] = LLM(tiny(family)).generate(LONG, temperature=0, max_tokens=3, logprobs=True, ignore_eos=True)
    assert answer.usage.prompt_tokens > 512
    assert list(answer.token_ids) == tokens
    assert [e.logprob for e in answer.logprobs or ()] == pytest.approx(logprobs, abs=1e-4)


def test_processed_logprobs_are_the_distribution_that_was_drawn_from(tiny: Callable[[str], Path]) -> None:
    llm = LLM(tiny("qwen3"))
    params = {"seed": 3, "max_tokens": 4, "temperature": 0.5, "logprobs": True, "top_logprobs": 20}
    [raw] = llm.generate(PROMPT, **params)
    [processed] = llm.generate(PROMPT, **params, logprobs_mode="processed")
    assert raw.token_ids == processed.token_ids
    for a, b in zip(raw.logprobs or (), processed.logprobs or (), strict=True):
        ids = [t.token_id for t in a.top]
        assert ids == [t.token_id for t in b.top]
        # At half the temperature every difference doubles.
        raw_steps = [a.top[0].logprob - t.logprob for t in a.top]
        assert [b.top[0].logprob - t.logprob for t in b.top] == pytest.approx([2 * s for s in raw_steps], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_widens_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """A tied embedding is the output layer's weight or in the checkpoint's dtype, and gives what float32 gives."""
    folder = tiny_models.write(tmp_path / "m", "qwen3", dtype=dtype)
    tokens, logprobs = _plain(folder, PROMPT, 3)
    llm = LLM(folder)
    model = llm.engine.model.runner._model.model  # type: ignore[attr-defined]
    embedding = model.get_input_embeddings()
    if isinstance(embedding, StoredEmbedding):
        assert embedding.packed.data.data_ptr() == model.get_output_embeddings().packed.data.data_ptr()
    else:
        assert embedding.weight.dtype == dtype
    [answer] = llm.generate(PROMPT, temperature=0, max_tokens=3, logprobs=True, ignore_eos=True)
    assert list(answer.token_ids) == tokens
    assert [e.logprob for e in answer.logprobs or ()] == pytest.approx(logprobs, abs=1e-4)


def test_an_embedding_that_scales_keeps_scaling_in_float32(tiny: Callable[[str], Path]) -> None:
    """Gemma multiplies by the square root of the width, which a bfloat16 embedding would round."""
    folder = tiny("gemma3_text")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 5]])
    ours = LLM(folder).engine.model.runner._model.model.get_input_embeddings()  # type: ignore[attr-defined]
    with torch.inference_mode():
        assert torch.equal(ours(ids), model.get_input_embeddings()(ids))

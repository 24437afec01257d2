"""A trained model instead of random weights: its answers make sense, and are the same whatever happens around them.

Skipped, with the reason, where the package index is not reachable and `VERBATIM_SMOLLM2` is not set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import real_model
from engine import LLM, ChatMessage, Constraint
from engine.checkpoints import gguf_file
from engine.compute.cpu.kernels import Kernels, NoKernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUESTIONS = ("What is the capital of France?", "Name three fruits.", "Write a line about the sea.")


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return real_model.gguf()
    except real_model.Unreachable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def llm(file: Path) -> LLM:
    return LLM(file, max_sequences=8, context_length=2048)


def _has_kernels() -> bool:
    try:
        Kernels.load()
    except NoKernels:
        return False
    return True


def _asked(question: str) -> list[ChatMessage]:
    return [ChatMessage("user", question)]


def test_it_is_what_its_file_says(llm: LLM) -> None:
    assert llm.info.id == "SmolLM2-135M-Instruct.Q4_1"
    assert llm.info.runner == "packed"
    assert llm.info.law.holds, llm.info.law.reason
    assert llm.info.linear == ("native, as stored" if _has_kernels() else "packed")
    [prompt] = [llm.engine.model.template.render(_asked("Hi"))]
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert llm.engine.model.tokenizer.convert_ids_to_tokens(llm.engine.model.end_ids) == ["<|endoftext|>", "<|im_end|>"]
    split = llm.engine.model.tokenizer("in 1234", add_special_tokens=False)["input_ids"]
    assert llm.engine.model.tokenizer.convert_ids_to_tokens(split) == ["in", "Ġ", "1", "2", "3", "4"]


def test_greedy_answers_are_those_of_transformers_and_make_sense(file: Path) -> None:
    """Of the widened weights: where they stay packed, inputs are rounded, and answers may differ."""
    llm = LLM(file, context_length=512, quantization="none")
    with gguf_file.fast_reading():
        place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        plain = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, attn_implementation="eager").eval()
    texts = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            made = plain.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids["input_ids"].shape[1] :].tolist()
        [answer] = llm.generate(_asked(question), temperature=0, max_tokens=24)
        assert [*answer.token_ids] == made
        texts.append(answer.text)
    assert "Paris" in texts[0]


def test_answers_of_the_file_as_it_is_make_sense(llm: LLM) -> None:
    """Asked what leaves the model no doubt: the likeliest tokens are half a nat and more ahead of the next."""
    [answer] = llm.generate(_asked("What is the capital city of Germany?"), temperature=0, max_tokens=24)
    assert answer.text == "The capital city of Germany is Berlin."


def test_a_seeded_reply_is_the_same_alone_and_in_a_crowd(llm: LLM) -> None:
    params: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7, "max_tokens": 24, "logprobs": True}
    [[alone]] = [llm.generate(_asked(QUESTIONS[2]), **params)]
    crowd = llm.generate_many([_asked(q) for q in (*QUESTIONS, *QUESTIONS)], **params)
    assert [(reply.token_ids, reply.logprobs) for reply in (crowd[2][0], crowd[5][0])] == [
        (alone.token_ids, alone.logprobs)
    ] * 2
    assert crowd[0][0].text != alone.text


def test_a_reply_keeps_to_its_schema(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    question = "Name the capital of France and how many people live there, as JSON."
    [reply] = llm.generate(_asked(question), constraint=Constraint("json", schema), temperature=0, max_tokens=64)
    assert reply.finish_reason == "stop"
    jsonschema.validate(json.loads(reply.text), schema)

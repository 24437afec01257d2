"""What a GGUF file says of text: words and spaces, where it begins and ends, its templates; as llama.cpp takes it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, LoadError, ModelConfig
from engine.loading.loader import load
from engine.types.messages import ChatMessage
from engine.types.tools import Tool
from tests import tiny_models
from tests.engine.gguf_files import KNOWN_TOKENS, SENTENCEPIECE, byte_level, header_only, sentencepiece, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What transformers makes of a Qwen3 GGUF file: it reads no head dimension, and takes 128."""
    return tiny_models.write(tmp_path / "folder", "qwen3", head_dim=128, vocab_size=KNOWN_TOKENS)


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"], (1, 2, 3)),
        (["<|return|>", "<|call|>", "<|end|>"], (0, 1)),
        (["<|end|>", "<|endoftext|>"], (0, 1)),
    ],
)
def test_tokens_that_end_an_answer_are_known_by_name(tokens: list[str], ends: tuple[int, ...]) -> None:
    """Many files name one end and answer with another; llama.cpp goes by the names, except gpt-oss' inner end."""
    types = [1 if token == "a" else 3 for token in tokens]
    file = header_only("llama", tokenizer__ggml__tokens=tokens, tokenizer__ggml__token_type=types)
    assert file.end_ids == ends
    text = header_only("llama", tokenizer__ggml__tokens=tokens, tokenizer__ggml__token_type=[1] * len(tokens))
    assert text.end_ids == ()


def test_all_end_tokens_and_templates_of_a_file_count(folder: Path, tmp_path: Path) -> None:
    tool_use = "TOOLS {{ tools[0].function.name }}: {{ messages[-1].content }}"
    file = write(
        folder,
        tmp_path / "model.gguf",
        extra=lambda w: (w.add_eot_token_id(7), w.add_string("tokenizer.chat_template.tool_use", tool_use)),
    )
    loaded = load(ModelConfig(id="m", path=file))
    assert loaded.tokenizer.convert_ids_to_tokens([0]) == ["<|endoftext|>"]  # ends by its name, as in llama.cpp
    assert loaded.end_ids == (0, 2, 7)
    assert loaded.template.source == (folder / "chat_template.jinja").read_text()
    tool = Tool("look", parameters={})
    assert loaded.template.render([ChatMessage("user", "Hi")], tools=[tool]) == "TOOLS look: Hi"


def test_a_sentencepiece_vocabulary_is_read_with_its_scores_and_its_first_token(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "folder", "llama", vocab_size=len(SENTENCEPIECE))
    llm = LLM(write(folder, tmp_path / "model.gguf", vocabulary=sentencepiece))
    names = llm.engine.model.tokenizer.convert_ids_to_tokens(llm.engine.model.tokenizer("hello world é")["input_ids"])
    assert names == ["<s>", "▁hello", "▁", "world", "▁", "<0xC3>", "<0xA9>"]
    [reply] = llm.generate("hello world", max_tokens=16, seed=1, ignore_eos=True)
    assert reply.usage.prompt_tokens == 4
    assert reply.text.count("world") == reply.token_ids.count(SENTENCEPIECE.index("world"))
    [chat] = llm.generate([ChatMessage("user", "hello")], max_tokens=1, seed=1)
    prompt = llm.engine.model.template.render([ChatMessage("user", "hello")])
    assert chat.usage.prompt_tokens == len(llm.engine.model.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_vocabulary_without_a_space_before_the_text_gets_none(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "folder", "llama", vocab_size=len(SENTENCEPIECE))
    file = write(
        folder, tmp_path / "model.gguf", vocabulary=sentencepiece, extra=lambda w: w.add_add_space_prefix(False)
    )
    tokenizer = load(ModelConfig(id="m", path=file)).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello")["input_ids"]) == ["<s>", "hello"]
    assert tokenizer.decode(tokenizer(" hello", add_special_tokens=False)["input_ids"]) == " hello"


@pytest.mark.parametrize(
    ("pre", "flag", "tokens"),
    [
        ("llama-bpe", None, ["<s>", "zqx"]),
        ("llama-bpe", False, ["zqx"]),
        ("tekken", True, ["<s>", "zqx"]),
        ("qwen2", None, ["z", "q", "x"]),
    ],
)
def test_words_that_are_tokens_stay_whole_and_a_text_begins_as_llama_cpp_begins_it(
    pre: str, flag: bool | None, tokens: list[str], tmp_path: Path
) -> None:
    """Llama 3's and Mistral's vocabularies hold words that no merge makes; their files need not say that BOS comes."""
    folder = tiny_models.write(tmp_path / "folder", "qwen3", head_dim=128, vocab_size=KNOWN_TOKENS + 2)

    def vocabulary(writer: Any, folder: Path, pre: str | None) -> None:
        byte_level(writer, folder, pre)
        for data in writer.kv_data:
            names, types = data["tokenizer.ggml.tokens"].value, data["tokenizer.ggml.token_type"].value
            names[KNOWN_TOKENS:], types[KNOWN_TOKENS:] = ["zqx", "<s>"], [1, 3]
        writer.add_bos_token_id(KNOWN_TOKENS + 1)
        if flag is not None:
            writer.add_add_bos_token(flag)

    tokenizer = load(
        ModelConfig(id="m", path=write(folder, tmp_path / "model.gguf", pre=pre, vocabulary=vocabulary))
    ).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("zqx")["input_ids"]) == tokens


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["in", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["in", "Ġ", "123", "4"]),
        ("gpt-2", ["in", "Ġ1234"]),
        ("default", ["in", "Ġ1234"]),
        (None, ["in", "Ġ1234"]),
    ],
)
def test_text_is_split_as_the_file_says(
    pre: str | None, pieces: list[str], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another split gives other tokens than in training, and worse replies that nobody can explain."""
    file = write(folder, tmp_path / "model.gguf", pre=pre)
    with caplog.at_level(logging.WARNING, "verbatim.engine"):
        tokenizer = load(ModelConfig(id="m", path=file)).tokenizer
    assert [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1234")] == pieces
    assert ("does not say how text is split" in caplog.text) == (pre in (None, "default"))


def test_a_split_that_is_not_known_is_refused(folder: Path, tmp_path: Path) -> None:
    file = write(folder, tmp_path / "model.gguf", pre="deepseek-v9")
    with pytest.raises(LoadError, match=r"splits text the way 'deepseek-v9'"):
        load(ModelConfig(id="m", path=file))

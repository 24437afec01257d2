"""The demo model's tokenizer: byte-level BPE learned from the corpus. Knows no model.

Each digit is a token of its own, quotes never join a word and `findGame` is two words, so that numbers can be computed and
what was read can be copied into JSON and into names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo import tools, words
from demo.corpus import conversation

TEMPLATE: Final = Path(__file__).with_name("chat_template.jinja")
CONTROL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special: left out of a reply's text."""
MARKS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""One token each, and part of the text."""
SIZE: Final = 4096
CONTEXT: Final = 2048
SHAPES: Final = 60
"""How often each shape of a word counts beside the corpus."""
PIECES: Final = r" ?\p{Lu}?[\p{Ll}\p{M}]+| ?\p{Lu}+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(seed: int | str, conversations: int) -> PreTrainedTokenizerFast:
    """Learn a tokenizer of `SIZE` tokens from the first conversations of a corpus. Same arguments, same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(MARKS),
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, conversations), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _texts(seed: int | str, conversations: int) -> Iterator[str]:
    """The text of the corpus, with the roles but without the marks of the template, and the shapes of its words.

    A word is copied as it stands into quotes, into a function's name or into upper case. That is easily learnt where it is
    one token in each of these places, and hardly where it falls into pieces.
    """
    for shape in _shapes():
        for _ in range(SHAPES):
            yield shape
    for index in range(conversations):
        drawn = conversation(f"{seed}/tokenizer", index)
        if drawn.tools:
            yield "# Tools"
        for tool in drawn.tools or []:
            yield _compact(tool["function"])
        for message in drawn.messages:
            yield f"{message['role']}\n{message['content']}"
            if "reasoning_content" in message:
                yield message["reasoning_content"]
            for call in message.get("tool_calls", []):
                yield _compact(call["function"])


def _shapes() -> list[str]:
    listed = sorted(words.LISTED)
    shapes = [*listed, *(f" {word}" for word in listed), *(f" {word.upper()}" for word in listed)]
    for word in (*tools.VERBS, *tools.OBJECTS, *tools.LABELS):
        shapes += [word, f" {word}"]
    shapes += [word.capitalize() for word in (*tools.VERBS, *tools.OBJECTS)]
    return list(dict.fromkeys(shapes))


def _compact(value: Any) -> str:
    return json.dumps(value)

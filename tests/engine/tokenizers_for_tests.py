"""Tiny tokenizers, one per family of decoders, so that the laws of text are tested without any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE = "Hello, world! naïve café  résumé — 漢字かな交じり文 🤷🏽‍♀️👨‍👩‍👧 \t\nno stop here\n\n### END ünïcödé"
PIECES = ["▁", "▁▁", "▁▁▁", "▁hello", "▁world", "hello", "lo", "▁世", "界", "é", "🤷", "\u200d", "a", "b", ".", "\n"]


def _wrap(backend: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def byte_level() -> Any:
    """GPT-2's way: 256 byte tokens and merges, a special token, one that is not, one outside the byte alphabet."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    backend.train_from_iterator([SAMPLE] * 4, trainer)
    backend.add_special_tokens(["<|im_end|>"])
    backend.add_tokens(["<tool_call>", AddedToken("naïve 漢 token", special=False), AddedToken("þÿ", special=False)])
    return _wrap(backend, eos_token="<|im_end|>")


def _sentencepiece(decoder: Any) -> Any:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocab = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.add_tokens(["</s>", "<tool call>", "▁odd"])
    return _wrap(backend, unk_token="<unk>", bos_token="<s>")


def llama_like() -> Any:
    """Llama 2, Phi 3: byte fallback, the first space of a text is stripped."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _sentencepiece(decoders.Sequence(steps))


def gemma_like() -> Any:
    """Gemma: byte fallback, nothing stripped."""
    return _sentencepiece(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def _metaspace(scheme: str) -> Any:
    pieces = [(piece, -1.0) for piece in ("<unk>", *PIECES, "<0x41>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<unk>"])
    return _wrap(backend, unk_token="<unk>")


def metaspace_always() -> Any:
    """T5, XLM-R: every space of the first token goes; `<0x41>` is no byte here."""
    return _metaspace("always")


def metaspace_first() -> Any:
    return _metaspace("first")


def metaspace_never() -> Any:
    return _metaspace("never")


def word_piece() -> Any:
    """BERT: words joined by spaces, `##` continues one."""
    names = ["[UNK]", "[CLS]", "hello", "##ing", "world", ".", "##s", "do", "n't"]
    backend = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.add_special_tokens(["[UNK]", "[CLS]"])
    return _wrap(backend, unk_token="[UNK]")


def word_suffix() -> Any:
    """The first GPT, CLIP: `</w>` ends a word, and becomes a space only when another token follows."""
    names = ["<unk>", "hel", "lo</w>", "world</w>", "a", "!</w>"]
    backend = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return _wrap(backend, unk_token="<unk>")


def no_decoder() -> Any:
    """A list of words: tokens joined by spaces."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "wörld": 2, "!": 3}, unk_token="<unk>"))
    return _wrap(backend, unk_token="<unk>")


TABLED: dict[str, Callable[[], Any]] = {
    builder.__name__: builder
    for builder in (byte_level, llama_like, gemma_like, metaspace_always, metaspace_first, metaspace_never)
}
"""Families whose bytes are read from a table."""
PROBED: dict[str, Callable[[], Any]] = {builder.__name__: builder for builder in (word_piece, word_suffix, no_decoder)}
"""Families whose bytes are asked of the tokenizer."""


# -- tokenizers that write as well as they read ------------------------------------------------------------------------

_ASCII = [chr(code) for code in range(0x21, 0x7F)]
_WORDS = ["yes", "no", "maybe", "so", "left", "right", "name", "true", "false", "null", "city", "Oslo", "arguments"]
_TEXT = [
    *_WORDS,
    '{"name": "left", "x": 12}',
    "maybe so, yes: no",
    '<tool_call>\n{"name": "',
    '", "arguments": {',
    SAMPLE,
]
_CONTROL = ["<unk>", "<s>", "</s>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def _chat(backend: Tokenizer) -> Any:
    """Wrap a tokenizer with a template and three control tokens, one of which ends a turn."""
    backend.add_special_tokens(_CONTROL)
    made = _wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def _bytes_and_words(prepend: bool) -> Tokenizer:
    """SentencePiece's BPE with byte fallback, trained on a few words behind `▁`."""
    steps: list[Any] = [normalizers.Prepend("▁")] if prepend else []
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=[*_CONTROL, *fallback], show_progress=False, min_frequency=1, max_token_length=9
    )
    backend.train_from_iterator(_TEXT * 4, trainer)
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in _CONTROL]
    backend = Tokenizer.from_str(json.dumps(parts))
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(decoder)
    return backend


def dummy_prefix() -> Any:
    """Phi 3, Llama 2: a space before every text, and before the text behind every control token."""
    return _chat(_bytes_and_words(prepend=True))


def dummy_prefix_once() -> Any:
    """Mistral 7B, newer Llama 2: a space before the first word only."""
    backend = _bytes_and_words(prepend=True)
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _chat(backend)


def no_dummy_prefix() -> Any:
    """Gemma: a space is `▁`, and none is added."""
    return _chat(_bytes_and_words(prepend=False))


def unigram(fallback: bool = True) -> Any:
    """T5, XLM-R: Unigram, a space before every word; letters are normalised."""
    words = ["▁", *_ASCII, *(f"▁{word}" for word in _WORDS), *_WORDS, '▁"', '":', "▁{"]
    pieces = [(token, 0.0) for token in _CONTROL] + [(word, -2.0 - 8.0 / len(word)) for word in words]
    if fallback:
        pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=fallback))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    if fallback:
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _chat(backend)


def unigram_with_holes() -> Any:
    """T5 itself: without byte fallback some characters have no token."""
    return unigram(fallback=False)


def byte_level_chat() -> Any:
    """Qwen, Llama 3."""
    return _chat(byte_level().backend_tokenizer)


def byte_level_lossy() -> Any:
    """Byte-level, but letters are composed and lowered, and white space at the ends is dropped."""
    backend = byte_level().backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    return _chat(backend)


def greedy_added_tokens() -> Any:
    """Byte-level, with added tokens that swallow the white space beside them, or are normalised, or stand alone."""
    backend = byte_level().backend_tokenizer
    backend.add_tokens([
        AddedToken("yes", lstrip=True, rstrip=True, normalized=False), AddedToken('"name"', rstrip=True),
        AddedToken("maybe", single_word=True), AddedToken("}", lstrip=True, normalized=True),
    ])  # fmt: skip
    return _chat(backend)


def word_piece_chat() -> Any:
    """BERT: `##` continues a word, and a space is nothing but the beginning of one."""
    names = [*_CONTROL, *_WORDS, *_ASCII, *(f"##{letter}" for letter in _ASCII), "##ing", "##left"]
    backend = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _chat(backend)


WRITERS: dict[str, Callable[[], Any]] = {
    builder.__name__: builder
    for builder in (
        byte_level_chat, byte_level_lossy, greedy_added_tokens, dummy_prefix, dummy_prefix_once, no_dummy_prefix,
        unigram, unigram_with_holes, word_piece_chat,
    )
}  # fmt: skip
"""Families that encode, too, with a chat template: replies that are held to a form are tried on each."""

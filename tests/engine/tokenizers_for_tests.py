"""Tiny tokenizers, one per family of decoders, so that the laws of text are tested without any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
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

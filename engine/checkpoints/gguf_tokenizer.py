"""Complete a tokenizer that transformers made of a GGUF file with what it skips, or refuse the file.

llama.cpp's `llama-vocab.cpp` says what each key means and what holds where it is absent; files rely on it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from engine.checkpoints.gguf_file import GGUFFile
from engine.errors import LoadError

__all__ = ["complete_tokenizer"]

log = logging.getLogger("verbatim.engine")


_PLAIN_SPLITS = frozenset({"gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "granite-docling"})
"""Values of `tokenizer.ggml.pre` for splitting words as GPT-2 does; transformers does so by itself."""
_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values for cutting every digit off first, and then splitting as GPT-2 does."""
_WHOLE_WORDS = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        "tekken",
    }
)
"""Values for taking a word that is a token whole, before any merge, and beginning with BOS unless the file objects."""


def complete_tokenizer(file: GGUFFile, tokenizer: Any, name: str) -> None:
    """Apply what the file says of splitting words, of how a text begins, and of named chat templates.

    Raises:
        LoadError: the file names a way to split that is not known: text would become other tokens than in training.
    """
    templates = file.chat_templates
    if templates is not None:
        tokenizer.chat_template = templates["default"] if list(templates) == ["default"] else templates
    how, kind = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("pre", "model"))
    if kind == "llama" and file.metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _add_no_space(tokenizer)
    if kind != "gpt2":
        return
    if how in _WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in file.metadata and "tokenizer.ggml.bos_token_id" in file.metadata:
            tokenizer.add_bos_token = True
    if how in _known_splits():
        return
    if how in (None, "default"):
        log.warning("%s: %s does not say how text is split into words: as GPT-2 does, then", name, file.path.name)
    elif how in _DIGIT_SPLITS:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif how not in _PLAIN_SPLITS:
        raise LoadError(
            f"{name}: {file.path.name} splits text the way {str(how)[:60]!r} (tokenizer.ggml.pre), which is not known "
            "here: its tokens would be wrong. Serve the checkpoint that the file was made of."
        )


def _add_no_space(tokenizer: Any) -> None:
    """Keep transformers from putting a space before a sentencepiece vocabulary's text, and from dropping one after."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    elif "Prepend" in str(json.loads(backend.to_str())["normalizer"]):
        backend.normalizer = normalizers.Replace(pattern=" ", content="▁")
    else:  # Gemma's puts none
        return
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _known_splits() -> frozenset[str]:
    """Return the ways to split words that transformers follows by itself."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)

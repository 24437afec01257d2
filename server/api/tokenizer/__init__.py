"""Texts as tokens and back: `/tokenize`, `/detokenize`, `/tokenizer_info`."""

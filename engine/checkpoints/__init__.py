"""A checkpoint's files: found, checked, and read into transformers' model and tokenizer."""

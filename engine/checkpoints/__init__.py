"""Find a checkpoint's files, check them, and read them into transformers' model and tokenizer."""

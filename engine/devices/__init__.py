"""The processors that a model is computed on, as the operating system and torch know them."""

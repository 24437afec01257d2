"""Grammars: which replies are allowed, as a mask over the vocabulary at each step. No torch."""

"""Grammars: what a reply may be, as a mask over the vocabulary at each step. No torch."""

"""Text and tokens: vocabulary, detokenizer, stop strings, JSON schemas. No torch."""

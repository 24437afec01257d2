"""From logits to tokens: edits, filters, a stateless draw, log-probabilities."""

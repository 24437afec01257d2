"""Tool calls in a model's text: whole calls are recognised, everything else stays text. No tokens, no torch."""

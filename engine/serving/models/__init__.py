"""Models that come and go: their states, who may leave for whom, and what is known before a model is loaded."""

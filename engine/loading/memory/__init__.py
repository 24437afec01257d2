"""Decide how much memory a loaded model may use, and for what."""

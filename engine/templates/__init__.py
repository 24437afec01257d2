"""Renders chat templates in a sandbox that counts steps and characters. No torch."""

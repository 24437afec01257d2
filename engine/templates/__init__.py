"""Chat templates: rendered in a sandbox that counts steps and characters. No torch."""

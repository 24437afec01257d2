"""A reply taken apart while it is written: thoughts, answer, tool calls. No torch."""

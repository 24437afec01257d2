"""Separates a reply into thoughts, answer and tool calls while it is generated. No torch."""

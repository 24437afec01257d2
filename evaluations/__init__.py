"""Evaluations by other people's harnesses, as clients of this server: tasks of our own, a check, a comparison."""

"""Runners that measure speed and memory, and the reports they write. Nothing here is imported by engine or server."""

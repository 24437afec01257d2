"""Engines beside an event loop: an engine on its own thread, its messages, and the models of one process."""

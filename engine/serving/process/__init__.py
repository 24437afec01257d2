"""A model in a process of its own: what crosses the pipe, the parent's end, and what the child runs."""

"""First contact with a GPU: checks in a child process, and the rungs of a ladder that a model steps down."""

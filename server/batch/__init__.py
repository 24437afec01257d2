"""Many requests from a file: `verbatim batch`."""

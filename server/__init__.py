"""verbatim's server: HTTP around the engine. Knows statuses, streams and settings; knows nothing of torch or tokens."""

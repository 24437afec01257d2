"""The endpoint: bodies in, replies out, and the description of both."""

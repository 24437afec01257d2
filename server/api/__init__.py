"""The endpoints: bodies are parsed, replies are written, and both are described."""

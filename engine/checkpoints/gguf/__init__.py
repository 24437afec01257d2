"""Read a GGUF file tensor by tensor, with its quantised weights as they are."""

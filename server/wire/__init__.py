"""HTTP itself: connections, bodies, hosts, origins and request ids. Knows nothing of models."""

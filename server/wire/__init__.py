"""HTTP itself: connections, bodies, hosts and origins. Knows nothing of models."""

"""What the server counts and measures, and how it tells it: as Prometheus reads it, and as JSON."""

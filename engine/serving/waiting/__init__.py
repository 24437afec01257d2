"""Who waits for what: turns among groups, and how long requests wait in the queue. Knows no engine."""

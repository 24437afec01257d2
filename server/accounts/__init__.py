"""Keys at work: authentication, limits, charging, and the commands that manage keys."""

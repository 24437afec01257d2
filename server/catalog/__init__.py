"""Models that can be got by name where only a package registry is reachable."""

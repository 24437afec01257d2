"""The forward pass: cache, attention, linear layers and the runner, over a device's backend."""

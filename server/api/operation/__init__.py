"""The endpoints for whoever runs the server: metrics, the machine, keys."""

"""`POST /responses`: items in, items out, over the same request and the same outputs as every other endpoint."""

"""Load an entry of models.yaml: place it, read it, try it, and make it ready to run."""

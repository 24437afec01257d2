"""From an entry of models.yaml to a model that is tried and ready to run."""

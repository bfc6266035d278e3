"""Configuration: the model, the sections of a run's YAML, parsing."""

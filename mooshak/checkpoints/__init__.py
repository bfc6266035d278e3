"""Checkpoints: formats, reading and writing, the manager of a run, resume."""

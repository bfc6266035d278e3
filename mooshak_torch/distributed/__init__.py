"""Distributed training: the process mesh and what is applied to a model on it."""

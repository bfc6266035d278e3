"""Distributed training: the process mesh and the parallelism applied to a model on it."""

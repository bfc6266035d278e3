"""Distributed training: the device mesh and the sharding of arrays on it."""

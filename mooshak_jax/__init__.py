"""Mooshak's mirror in Flax NNX; imports neither mooshak_torch nor torch."""

"""Rotary position embedding (arXiv:2104.09864): the tables of cosines and sines, in float64."""

import numpy as np

from mooshak.config import ModelConfig


def rope_tables(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each float64 [max_seq_len, head_dim / 2], for the rotate-half layout.

    Element j of a head's first half and element j of its second half are rotated by the angle
    position * theta^(-2j / head_dim).
    """
    frequencies = model.rope_theta ** (-np.arange(0, model.K, 2, dtype=np.float64) / model.K)
    angles = np.arange(model.max_seq_len, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)

"""Rotary position embedding (arXiv:2104.09864): tables of cosines and sines in float64."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mooshak.config.model import ModelConfig


def rope_tables(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin, each float64 [max_seq_len, head_dim / 2], for the rotate-half layout.

    Element j of the first half of a head and element j of the second half are rotated by the angle
    position * theta^(-2j / head_dim), with the frequency rescaled by `rope_scaling`.
    """
    frequencies = model.rope_theta ** (-np.arange(0, model.K, 2, dtype=np.float64) / model.K)
    if model.rope_scaling is not None:
        frequencies = rescaled(frequencies, model.rope_scaling)
    angles = np.arange(model.max_seq_len, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def rescaled(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Return frequencies rescaled for texts longer than those of the training.

    linear divides all of them by the factor (arXiv:2306.15595). llama3 (arXiv:2407.21783) divides
    those with fewer than low_freq_factor rotations within the original length, does not change
    those with more than high_freq_factor, and interpolates linearly in between.
    """
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    unscaled = np.clip((rotations - low) / (high - low), 0, 1)
    return frequencies * (unscaled + (1 - unscaled) / scaling["factor"])

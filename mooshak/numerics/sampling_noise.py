"""Sampling noise: a uniform number per (seed, sample, position), for both frameworks."""

import numpy as np

from mooshak.numerics.philox import random_words


def noise(seed: int, sample: int, positions: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) for the first `positions` new tokens of a sample.

    float64 [positions]. The number of a position depends neither on `positions` nor on the other
    rows of a batch.
    """
    words = random_words(f"{seed}:{sample}", 0, positions)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

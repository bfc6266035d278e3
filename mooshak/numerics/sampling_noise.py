"""Sampling noise: a uniform number per (seed, sample, position), for both frameworks."""

import hashlib

import numpy as np


def noise(seed: int, sample: int, positions: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) for the first `positions` new tokens of a sample.

    float64 [positions]. The number of a position depends neither on `positions` nor on the other
    rows of a batch.
    """
    key = np.frombuffer(
        hashlib.blake2b(f"{seed}:{sample}".encode(), digest_size=16).digest(), "<u8"
    )
    words = np.random.Philox(key=key).random_raw(positions)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

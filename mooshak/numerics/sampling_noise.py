"""The noise of sampling: one uniform number per (seed, sequence, position), for both frameworks."""

import hashlib

import numpy as np


def noise(seed: int, sequence: int, positions: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for the first positions of a sequence, float64 [positions].

    A position's number depends neither on how many are asked for nor on the batch around it.
    """
    key = np.frombuffer(
        hashlib.blake2b(f"{seed}:{sequence}".encode(), digest_size=16).digest(), "<u8"
    )
    words = np.random.Philox(key=key).random_raw(positions)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

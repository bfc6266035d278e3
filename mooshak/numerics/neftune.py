"""NEFTune (arXiv:2310.05914): uniform noise on the embeddings of fine-tuning.

The host draws a key for each token, a pure function of (seed, step, row, position); the device
hashes it with the index of each component. Integer arithmetic is exact everywhere, so the noise
has the same bits in both frameworks, under any split of the batch.

Shapes: B rows, T positions, D model width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mooshak.numerics.philox import random_words


def noise_keys(seed: int, step: int, rows: Sequence[int], T: int) -> np.ndarray:
    """Return a key for each token of these rows of the global batch of a step, int32 [B, T]."""
    words = [random_words(f"neftune {seed} {step} {row}", 0, -(-T // 2)) for row in rows]
    return np.stack(words).view(np.int32)[:, :T]


def noise_scales(segments_BT: np.ndarray, alpha: float, dim: int) -> np.ndarray:
    """Return the largest noise on each token, float64 [B, T]: alpha / sqrt(L D).

    L is the number of tokens of the token's own document; padding (segment 0) has no noise.
    """
    lengths_BT = np.stack([np.bincount(row_T)[row_T] for row_T in segments_BT])
    return np.where(segments_BT > 0, alpha / np.sqrt(lengths_BT * dim), 0.0)


def embedding_noise(keys_BT: Any, index_D: Any, scales_BT: Any) -> Any:
    """Return noise [B, T, D] in the dtype of the scales, uniform in [-scale, scale).

    Arrays of torch, JAX or NumPy: int32 keys, the int32 index 0 .. D - 1 of the components, and
    scales. The hash is the finalizer of a 32-bit mixer (Wellons, "lowbias32") on a Weyl sequence.
    """
    x = keys_BT[..., None] + index_D * WEYL
    x = (x ^ (x >> 16 & 0xFFFF)) * MULTIPLIERS[0]
    x = (x ^ (x >> 15 & 0x1FFFF)) * MULTIPLIERS[1]
    x = x ^ (x >> 16 & 0xFFFF)
    # 24 bits, which float32 has: the product is rounded once.
    return (x >> 8) * (scales_BT[..., None] * 2.0**-23)


WEYL = 0x9E3779B9 - 2**32
MULTIPLIERS = 0x7FEB352D, 0x846CA68B - 2**32
"""Odd constants as int32, whose products wrap."""

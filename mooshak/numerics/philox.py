"""Philox-4x64 streams (Salmon et al., SC 2011): random words that depend on a name only."""

import hashlib

import numpy as np


def random_words(stream: str, start: int, count: int) -> np.ndarray:
    """Return `count` words of a stream from block `start` of four words on, uint64 [count].

    The key is a hash of the name of the stream, so words can be computed from any position.
    """
    key = np.frombuffer(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "<u8")
    return np.random.Philox(key=key, counter=start).random_raw(count)

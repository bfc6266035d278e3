"""Packed batches for tests."""

import numpy as np

from mooshak.data.packing import IGNORE_INDEX, Batch, make_batch


def packed_batch(seed: int, rows: int, T: int, vocab_size: int) -> Batch[np.ndarray]:
    """Return a batch of short documents whose rows have unequal numbers of labels that count."""
    random_ = np.random.default_rng(seed)
    tokens_BS = random_.integers(3, vocab_size, (rows, T + 1), dtype=np.int32)
    # In the first row every token is a document; the later the row, the longer they are.
    is_first_BS = random_.random((rows, T + 1)) < 1.0 / (1 + np.arange(rows)[:, None])
    batch = make_batch(tokens_BS, is_first_BS.cumsum(1, np.int32))
    counts_B = (batch.labels != IGNORE_INDEX).sum(1)
    assert counts_B[0] == 0 and counts_B[-1] > T // 2
    return batch

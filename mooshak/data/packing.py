"""The structure of a batch, made from rows of packed documents.

Imports neither Grain nor a framework: the arrays of a `Batch` are NumPy's, torch's or JAX's.

Shapes: B rows, T positions, S = T + 1 tokens.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

IGNORE_INDEX = -100
"""Label of a position that is excluded from the loss."""

Array = TypeVar("Array")


class Batch(NamedTuple, Generic[Array]):
    """Rows of tokens and their labels, arrays [B, T]; a pytree in JAX and in torch.

    Without document masks `segments` and `positions` are None and no label is ignored.
    """

    tokens: Array
    """Token ids."""
    labels: Array
    """The next token of each position, or `IGNORE_INDEX`."""
    segments: Array | None = None
    """The document of each token, numbered from 1 in each row; 0 is padding."""
    positions: Array | None = None
    """Position of each token in its document, from 0."""
    reference: Array | None = None
    """Preference pairs: the log-probability [B, S] of each segment's labels under the reference.

    Segments 1, 3, ... are chosen answers with their prompts, 2, 4, ... the rejected ones; of KTO,
    the answers, and answers to other prompts. Of sampled answers, that of each label [B, T].
    """
    weights: Array | None = None
    """KTO: the weight [B, S / 2] of each answer, negative for undesirable ones; 0: no answer. Of
    sampled answers, the weight [B, T] of each token."""
    baseline: Array | None = None
    """KTO: the reference point [B, 1], the same in all rows; set by the objective."""
    advantages: Array | None = None
    """Sampled answers: the advantage [B, S] of each segment, 0 where there is none."""
    old_log_probs: Array | None = None
    """Sampled answers: the log-probability [B, T] of each label under the model that sampled it."""
    noise_keys: Array | None = None
    """NEFTune: the key of the noise on each token's embedding."""
    noise_scales: Array | None = None
    """NEFTune: the largest noise on each token's embedding."""

    def map(self, function: Callable[[Any], Any]) -> "Batch[Any]":
        """Return a batch with `function` applied to each array."""
        return Batch(*(None if array is None else function(array) for array in self))

    def rows(self, which: Any) -> "Batch[Array]":
        """Return the rows at an index, such as a slice or a list."""
        return self.map(lambda array: array[which])

    def chunk(self, n: int) -> "list[Batch[Array]]":
        """Split by rows into at most `n` batches; the last may be smaller."""
        B = len(self.tokens)  # type: ignore[arg-type]  # an array has a length
        size = -(-B // n)
        return [self.rows(slice(start, start + size)) for start in range(0, B, size)]

    @property
    def n_segments(self) -> int:
        """Segments of a row, where each has a value: preference pairs, sampled answers."""
        values = self.reference if self.advantages is None else self.advantages
        return int(values.shape[1])  # type: ignore[union-attr]

    @property
    def context(self) -> dict[str, Any]:
        """Keyword arguments of `Model.hidden_states`: positions, segments and noise, if set."""
        noise = None if self.noise_keys is None else (self.noise_keys, self.noise_scales)
        given = {"positions_BT": self.positions, "segments_BT": self.segments, "noise": noise}
        return {name: value for name, value in given.items() if value is not None}


def make_batch(tokens_BS: np.ndarray, segments_BS: np.ndarray | None = None) -> Batch[np.ndarray]:
    """Return inputs and next-token labels of rows of T + 1 tokens, int32.

    `segments_BS` numbers the documents in a row: adjacent tokens with one number belong to one
    document. Positions restart at each document, and the first token of a document is not a label,
    since the preceding document does not predict it.
    """
    batch = Batch(tokens_BS[:, :-1], tokens_BS[:, 1:])
    if segments_BS is None:
        return batch
    is_first_BS = np.ones(segments_BS.shape, bool)
    np.not_equal(segments_BS[:, 1:], segments_BS[:, :-1], out=is_first_BS[:, 1:])
    index_T = np.arange(batch.tokens.shape[1], dtype=np.int32)
    starts_BT = np.maximum.accumulate(np.where(is_first_BS[:, :-1], index_T, 0), axis=1)
    return batch._replace(
        labels=np.where(is_first_BS[:, 1:], np.int32(IGNORE_INDEX), batch.labels),
        segments=segments_BS[:, :-1],
        positions=index_T - starts_BT,
    )


def pad_rows(batch: Batch[np.ndarray], n_rows: int) -> Batch[np.ndarray]:
    """Append rows of padding, with ignored labels, up to `n_rows` rows."""
    missing = ((0, n_rows - len(batch.tokens)), (0, 0))
    labels_BT = np.pad(batch.labels, missing, constant_values=IGNORE_INDEX)
    return batch.map(lambda array: np.pad(array, missing))._replace(labels=labels_BT)

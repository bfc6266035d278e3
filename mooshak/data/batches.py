"""Batches: the batch of training step k is a pure function of (seed, k, configuration).

The tokens of each source are split into sequences, shuffled in every epoch, and interleaved by
weight into an endless list of rows. Step k reads rows k B .. k B + B - 1, which processes and
workers only divide among them: a run resumes on any number of processes, and the position in the
data is the step.

Importing this module imports Grain, which imports jax (without initialising a device).
"""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import lcm
from pathlib import Path

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from mooshak.config.sections import Config, SourceConfig
from mooshak.data.packing import Batch, make_batch
from mooshak.data.shards import TokenShards
from mooshak.errors import InputError


def train_batches(
    config: Config, start_step: int = 0, process: int = 0, processes: int = 1
) -> Iterator[Batch[np.ndarray]]:
    """Return the batches from `start_step` on, arrays int32 [B / processes, T].

    Of the global batch, process p reads rows p b .. p b + b - 1, where b = B / processes.
    """
    B = config.train.batch_size
    if B % processes:
        raise InputError(
            f"train.batch_size {B} is not divisible by {processes} processes; change one of them"
        )
    if not 0 <= process < processes:
        raise InputError(f"process {process} is not in 0 .. {processes - 1}")
    b = B // processes
    return batches_of_rows(config, range(process * b, process * b + b), start_step)


def batches_of_rows(
    config: Config, rows: Sequence[int], start_step: int = 0
) -> Iterator[Batch[np.ndarray]]:
    """Return these rows of the global batches from `start_step` on, arrays int32 [rows, T]."""
    batches = _RowsOfBatches(Mixture(config), rows, config.train.batch_size)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    dataset = grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options)
    if config.data.workers > 0:
        # Grain's worker processes read the flags of absl, which only an absl program parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(config.data.workers))
    return map(_as_batch, dataset)


def global_batch(config: Config, step: int) -> Batch[np.ndarray]:
    """Return the global batch of a step, arrays int32 [B, T]."""
    B = config.train.batch_size
    return _as_batch(_RowsOfBatches(Mixture(config), range(B), B)[step])


def validation_sequences(config: Config) -> dict[str, Batch[np.ndarray]]:
    """Return the validation sequences of each language, arrays int32 [N, T]; always the same.

    They are spread evenly over the validation splits of the language's sources, at most
    `evaluate.sequences` of them (0: all). Empty if `data.validation_fraction` is 0.
    """
    if config.data.validation_fraction == 0:
        return {}
    result = {}
    for language in dict.fromkeys(source.language for source in config.data.sources):
        sources = [source for source in config.data.sources if source.language == language]
        splits = [_shards(config, source, "validation") for source in sources]
        long_enough = [shards for shards in splits if len(shards) > config.T]
        if not long_enough:
            raise InputError(
                f"the validation split in language {language} has {sum(map(len, splits))} tokens, "
                f"a sequence needs {config.T + 1}; raise data.validation_fraction, add text, "
                "or set it to 0 to train without validation"
            )
        mask = config.data.document_mask
        parts = [PackedSequences(shards, config.T, mask) for shards in long_enough]
        every = [(part, row) for part in parts for row in range(len(part))]
        n = min(config.evaluate.sequences or len(every), len(every))
        chosen = [every[i * len(every) // n] for i in range(n)]
        result[language] = _as_batch(np.stack([part[row] for part, row in chosen]))
    return result


class Mixture:
    """The endless list of training rows, each an item of a `PackedSequences`."""

    def __init__(self, config: Config) -> None:
        self.by_weight = WeightedInterleave([source.weight for source in config.data.sources])
        self.sources = []
        for source in config.data.sources:
            shards = _shards(config, source, "train")
            sequences = PackedSequences(shards, config.T, config.data.document_mask)
            seed = hashlib.sha256(f"{config.run.seed}/{source.name}".encode()).digest()[:4]
            self.sources.append(EpochShuffle(sequences, int.from_bytes(seed)))

    def __getitem__(self, index: int) -> np.ndarray:
        source, index = self.by_weight[index]
        return self.sources[source][index]


class EpochShuffle:
    """An endless list of sequences: all of them in every epoch, in another order.

    The order is the one of Grain's `MapDataset.shuffle` and `repeat`.
    """

    def __init__(self, sequences: "PackedSequences", seed: int) -> None:
        self.sequences, self.n, self.seed = sequences, len(sequences), seed

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, index = divmod(index, self.n)
        seed = (self.seed + epoch) % 2**32
        return self.sequences[index_shuffle(index, max_index=self.n - 1, seed=seed, rounds=4)]


class PackedSequences:
    """Tokens as a list of sequences: item i is tokens i T .. i T + T.

    The last token of an item, its last label, is the first input of the next item. An item is int32
    [T + 1], or with `document_mask` [2, T + 1]: tokens, and their documents.
    """

    def __init__(self, shards: TokenShards, T: int, document_mask: bool = False) -> None:
        self.shards, self.T, self.document_mask = shards, T, document_mask
        if len(shards) <= T:
            raise InputError(
                f"the {shards.split} split in {shards.directory} has {len(shards)} tokens, a "
                f"sequence needs {T + 1}; add text or lower train.sequence_length"
            )
        if document_mask and not shards.has_offsets:
            raise InputError(
                f"the shards in {shards.directory} have no document offsets; add them with "
                "`python -m mooshak.data prepare --config FILE --data.document_mask true`"
            )

    def __len__(self) -> int:
        return (len(self.shards) - 1) // self.T

    def __getitem__(self, index: int) -> np.ndarray:
        tokens_S = self.shards.window(index * self.T, self.T + 1)
        if not self.document_mask:
            return tokens_S
        return np.stack([tokens_S, self.shards.segments(index * self.T, self.T + 1)])

    def __repr__(self) -> str:
        return f"PackedSequences({self.shards.directory}, {self.shards.split}, T={self.T})"


class WeightedInterleave:
    """The map from row k of a mixture to a source and a row of the source.

    The weights are used as exact decimal fractions and hold in every prefix: of the first k rows,
    the first source has its exact share, rounded up; of the remaining rows, the second source has
    its share among the remaining sources, rounded up; and so on. (Grain's `MapDataset.mix` does the
    same with weights rounded to a hundredth of the smallest.)
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fractions = [Fraction(repr(weight)) for weight in weights]
        scale = lcm(*(fraction.denominator for fraction in fractions))
        self.weights = [int(fraction * scale) for fraction in fractions]

    def __getitem__(self, index: int) -> tuple[int, int]:
        left, before, after = sum(self.weights), index, index + 1
        for source, weight in enumerate(self.weights):
            # Rows of the sources after this one, among the first `before` and `after` rows.
            rest_before = before * (left - weight) // left
            rest_after = after * (left - weight) // left
            if rest_before == rest_after:
                return source, before - rest_before
            left, before, after = left - weight, rest_before, rest_after
        raise AssertionError("the last source takes every row that reaches it")


class _RowsOfBatches:
    """Some rows of every batch of B rows of a mixture; item k belongs to step k."""

    def __init__(self, mixture: Mixture, rows: Sequence[int], B: int) -> None:
        self.mixture, self.rows, self.B = mixture, rows, B

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: int) -> np.ndarray:
        return np.stack([self.mixture[step * self.B + row] for row in self.rows])


def _as_batch(rows: np.ndarray) -> Batch[np.ndarray]:
    """Return the batch of stacked rows, [B, T + 1] or [B, 2, T + 1]."""
    return make_batch(rows) if rows.ndim == 2 else make_batch(rows[:, 0], rows[:, 1])


def _shards(config: Config, source: SourceConfig, split: str) -> TokenShards:
    return TokenShards(Path(config.data.dir) / source.name, split)

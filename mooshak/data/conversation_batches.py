"""Batches of conversations: tokenized, packed into rows, in another order in every epoch.

An epoch has each conversation once. The batch of a step is a pure function of (seed, step,
configuration), as in pretraining: processes and micro-batches only divide its rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.config.sections import Config
from mooshak.corpus.filters import in_validation
from mooshak.data.conversations import Conversation, conversations
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.samples import Sample, best_fit, encode_samples, make_rows, truncate
from mooshak.errors import InputError, require
from mooshak.numerics.neftune import noise_keys, noise_scales
from mooshak.numerics.philox import random_words
from mooshak.tokenizer.train import load_or_train_tokenizer


class ConversationData:
    """The conversations of a configuration; implements `mooshak.data.training_data.TrainingData`.

    Raises `InputError` for records that are no conversations, and where more than `sft.max_skipped`
    of them have no label.
    """

    def __init__(self, config: Config) -> None:
        _check(config)
        self.config, self.tokenizer = config, load_or_train_tokenizer(config)
        self.counts = dict.fromkeys(("conversations", "samples", "skipped", "cut", "cut_tokens"), 0)
        self._train: list[Sample] = []
        self._validation: dict[str, list[Sample]] = {}
        self._languages: list[str] = []
        """Of the training samples."""
        self.description = {
            source.name: self._read(source.name, conversations(source, config))
            for source in config.data.sources
        }
        if not self._train:
            raise InputError("the sources have no conversation to train on; check their paths")
        is_packed = config.sft.packing == "best_fit"
        plan = PackedRows if is_packed else BucketedRows
        sizes = [sample.size for sample in self._train]
        self.plan = plan(sizes, config.T, config.train.batch_size, config.run.seed)

    @property
    def summary(self) -> str:
        """The counts of the conversations, in one line."""
        counts, sizes = self.counts, sum(sample.size for sample in self._train)
        labels = sum(sample.n_labels for sample in self._train)
        cut = (
            f"{counts['cut']} cut at {self.config.T} tokens, which lost {counts['cut_tokens']} "
            f"tokens of answers, "
            if counts["cut"]
            else ""
        )
        skipped = f"{counts['skipped']} skipped without a label, " if counts["skipped"] else ""
        return (
            f"{counts['conversations']} conversations, {counts['samples']} samples, {cut}{skipped}"
            f"{labels} labels in {sizes} tokens; an epoch is {self.plan.epoch}"
        )

    def batches(self, rows: Sequence[int], first: int) -> Iterator[Batch[np.ndarray]]:
        """Return these rows of the global batches from step `first` on, arrays int32 [rows, T]."""
        step = first
        while True:
            yield self._batch(step, rows)
            step += 1

    def global_batch(self, step: int) -> Batch[np.ndarray]:
        """Return the global batch of a step, arrays int32 [B, T]."""
        return self._batch(step, range(self.config.train.batch_size))

    def validation(self) -> dict[str, Batch[np.ndarray]]:
        """Return packed rows of the held-out conversations of each language, int32 [N, T].

        At most `evaluate.sequences` rows of a language (0: all), the same in every run.
        """
        result = {}
        for language, samples in self._validation.items():
            rows = best_fit([sample.size for sample in samples], self.config.T)
            rows = rows[: self.config.evaluate.sequences or None]
            result[language] = make_rows([[samples[i] for i in row] for row in rows], self.config.T)
        return result

    def token_counts(self, language: str) -> np.ndarray:
        """Count each label of the training conversations of a language, int64 [vocab_size]."""
        counts_V = np.zeros(self.config.model.vocab_size, np.int64)
        for sample, own in zip(self._train, self._languages, strict=True):
            if own == language:
                labels = sample.labels[sample.labels != IGNORE_INDEX]
                counts_V += np.bincount(labels, minlength=len(counts_V))
        return counts_V

    def _batch(self, step: int, rows: Sequence[int]) -> Batch[np.ndarray]:
        T, chosen = self.plan.rows(step)
        batch = make_rows([[self._train[i] for i in chosen[row]] for row in rows], T)
        config, alpha = self.config, self.config.sft.neftune_alpha
        if not alpha:
            return batch
        assert batch.segments is not None
        return batch._replace(
            noise_keys=noise_keys(config.run.seed, step, rows, T),
            noise_scales=noise_scales(batch.segments, alpha, config.model.dim),
        )

    def _read(self, name: str, found: Iterator[Conversation]) -> dict[str, Any]:
        """Tokenize the conversations of a source; return the description of its training tokens."""
        config, first = self.config, len(self._train)
        for one in found:
            self.counts["conversations"] += 1
            held_out = in_validation(one.text(), config.data.validation_fraction)
            for sample in self._encode(one):
                self.counts["samples"] += 1
                if held_out:
                    self._validation.setdefault(one.language, []).append(sample)
                else:
                    self._train.append(sample)
                    self._languages.append(one.language)
        # The noise is none of the data.
        settings = {key: v for key, v in asdict(config.sft).items() if key != "neftune_alpha"}
        mine, digest = self._train[first:], hashlib.sha256(repr(settings).encode())
        for sample in mine:
            digest.update(np.stack([sample.tokens, sample.labels]).tobytes())
        return {
            "documents": len(mine),
            "tokens": sum(len(sample.tokens) for sample in mine),
            "shard_tokens": None,
            "sha256": digest.hexdigest(),
        }

    def _encode(self, one: Conversation) -> Iterator[Sample]:
        """Yield the samples of a conversation, cut to the sequence; count those that are lost."""
        try:
            if len(one.answers) != 1:
                raise InputError(f"{one.where}: a {one.shape} has two answers; sft needs one")
            for sample in encode_samples(self.tokenizer, one.prompt, one.answers[0]):
                short = truncate(sample, self.config.T)
                if not short.n_labels:
                    self._skip(
                        one.where,
                        f"no label is left in train.sequence_length {self.config.T} tokens: the "
                        f"prompt has {len(sample.tokens) - sample.n_labels}",
                    )
                    continue
                if short.n_labels < sample.n_labels:
                    self.counts["cut"] += 1
                    self.counts["cut_tokens"] += sample.n_labels - short.n_labels
                yield short
        except InputError as error:
            if str(error).startswith(one.where):
                raise
            self._skip(one.where, str(error))

    def _skip(self, where: str, reason: str) -> None:
        self.counts["skipped"] += 1
        if self.counts["skipped"] > self.config.sft.max_skipped:
            raise InputError(
                f"{where}: {reason} ({self.counts['skipped']} conversations without a label, "
                f"sft.max_skipped is {self.config.sft.max_skipped})"
            )


def _check(config: Config) -> None:
    """Raise `InputError` for settings that conversations do not have."""
    path = Path(config.tokenizer.path)
    require(
        path.exists(),
        f"tokenizer {path} is missing; fine-tune a checkpoint with --init.from, or name its "
        "tokenizer",
    )
    weights = {source.weight for source in config.data.sources}
    require(
        len(weights) == 1,
        "data.sources weight: an epoch has each conversation once, whatever its source; repeat or "
        "limit (documents) a source instead",
    )
    require(
        not (config.sft.neftune_alpha and config.parallel.sequence_parallel),
        "sft.neftune_alpha needs the embeddings of full sequences; set parallel.sequence_parallel "
        "false",
    )
    require(
        config.sft.packing == "best_fit" or not config.parallel.sequence_parallel,
        "sft.packing none has rows of several lengths, which parallel.sequence_parallel cannot "
        "divide; use best_fit",
    )


class PackedRows:
    """Rows packed by best fit; step k reads rows k B .. k B + B - 1 of an endless list."""

    def __init__(self, sizes: Sequence[int], T: int, B: int, seed: int) -> None:
        self.T, self.B, self.seed = T, B, seed
        # Which conversations share a row depends on the seed, too.
        order = shuffled(len(sizes), f"pack {seed}")
        packed = best_fit([sizes[i] for i in order], T)
        self.packed = [[int(order[i]) for i in row] for row in packed]
        n = len(packed)
        self.epoch = f"{n} rows of {T} tokens, {sum(sizes) / (n * T):.1%} full: {n / B:.1f} steps"

    def rows(self, step: int) -> tuple[int, list[list[int]]]:
        """Return the length of the rows of a step, and the samples in each."""
        chosen = []
        for index in range(step * self.B, step * self.B + self.B):
            epoch, index = divmod(index, len(self.packed))
            order = shuffled(len(self.packed), f"epoch {self.seed} {epoch}")
            chosen.append(self.packed[order[index]])
        return self.T, chosen


class BucketedRows:
    """A conversation per row, batches of similar lengths; an epoch's last ones may be not full.

    Rows are padded to a quarter, a half or all of the sequence: JAX compiles a step per length.
    """

    def __init__(self, sizes: Sequence[int], T: int, B: int, seed: int) -> None:
        self.B, self.seed, sizes_N = B, seed, np.array(sizes)
        lengths = row_lengths(T)
        bucket_N = np.searchsorted(lengths, sizes_N)
        self.buckets = [(length, np.flatnonzero(bucket_N == i)) for i, length in enumerate(lengths)]
        self.batches = [
            (number, start)
            for number, (_, members) in enumerate(self.buckets)
            for start in range(0, len(members), B)
        ]
        self.epoch = f"{len(sizes)} rows of {', '.join(map(str, lengths))} tokens: "
        self.epoch += f"{len(self.batches)} steps"

    def rows(self, step: int) -> tuple[int, list[list[int]]]:
        """Return the length of the rows of a step, and the samples in each."""
        epoch, index = divmod(step, len(self.batches))
        order = shuffled(len(self.batches), f"epoch {self.seed} {epoch}")
        number, start = self.batches[order[index]]
        T, members = self.buckets[number]
        within = shuffled(len(members), f"bucket {self.seed} {epoch} {number}")
        rows = [[int(i)] for i in members[within][start : start + self.B]]
        return T, rows + [[]] * (self.B - len(rows))


def row_lengths(T: int) -> list[int]:
    """Return the lengths that rows of at most T tokens are padded to: a quarter, a half, all."""
    return sorted({min(T, -(-T // (part * 16)) * 16) for part in (4, 2, 1)})


@lru_cache(maxsize=8)
def shuffled(n: int, name: str) -> np.ndarray:
    """Return a permutation of 0 .. n - 1 that depends on the name only, int64 [n]."""
    return np.argsort(random_words(name, 0, n), kind="stable")

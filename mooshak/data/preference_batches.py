"""Batches of preference pairs: chosen and rejected answers as two segments of one row.

A pair is never split over rows, so that processes and micro-batches only divide rows. Reference
log-probabilities are computed once, before the first step, and saved in the run directory. Held out
for validation are all pairs of some prompts, by a hash of the prompt.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.config.sections import Config
from mooshak.corpus.filters import in_validation
from mooshak.data.conversation_batches import PackedRows
from mooshak.data.conversations import Conversation, conversations
from mooshak.data.packing import Batch
from mooshak.data.samples import Sample, best_fit, encode_sample, make_rows, truncate
from mooshak.errors import InputError, require
from mooshak.files import write_atomically
from mooshak.tokenizer.train import load_or_train_tokenizer

REFERENCE_FILE = "reference.json"
"""File of a run directory with the log-probabilities of the reference, and the pairs' digest."""

LIVE_TOLERANCE = 0.01
"""Relative difference of a log-probability that rounding in any dtype stays below."""


class PreferenceData:
    """The pairs of a configuration; implements `mooshak.data.training_data.TrainingData`.

    Raises `InputError` for records that are no pairs, and where more than `dpo.max_skipped` of them
    lose an answer.
    """

    def __init__(self, config: Config) -> None:
        path = Path(config.tokenizer.path)
        require(path.exists(), f"tokenizer {path} is missing; align a checkpoint with --init.from")
        self.config, self.tokenizer = config, load_or_train_tokenizer(config)
        self.n_skipped = self.n_cut = 0
        self._pairs: list[tuple[Sample, Sample]] = []
        self._weights: list[float] = []
        """KTO: of each pair of an answer and an answer to another prompt."""
        self._train: list[int] = []
        """Indices of the pairs that are trained."""
        self._held_out: dict[str, list[int]] = {}
        """Language -> indices of the pairs for validation."""
        self.description = {
            source.name: self._read(conversations(source, config)) for source in config.data.sources
        }
        if not self._train:
            raise InputError("the sources have no preference pair to train on; check their paths")
        self.plan = PackedRows(
            self._sizes(self._train), config.T, config.train.batch_size, config.run.seed
        )
        self._validation = self._pack_held_out()
        packed = [*self.plan.packed, *(row for rows in self._validation.values() for row in rows)]
        self.n_segments = 2 * max(map(len, packed))
        self.reference = np.zeros((len(self._pairs), 2))
        """Log-probability of the chosen and the rejected answer of each pair, nats."""

    @property
    def summary(self) -> str:
        """The counts of the pairs, in one line."""
        cut = f"{self.n_cut} cut at {self.config.T} tokens, " if self.n_cut else ""
        skipped = f"{self.n_skipped} skipped, " if self.n_skipped else ""
        n_held_out = len(self._pairs) - len(self._train)
        held_out = f"{n_held_out} more held out, " if n_held_out else ""
        return (
            f"{len(self._train)} preference pairs, {held_out}{cut}{skipped}an epoch is "
            f"{self.plan.epoch}"
        )

    def batches(self, rows: Sequence[int], first: int) -> Iterator[Batch[np.ndarray]]:
        """Return these rows of the global batches from step `first` on, arrays [rows, T]."""
        step = first
        while True:
            _, chosen = self.plan.rows(step)
            yield self._rows([self._trained(chosen[row]) for row in rows])
            step += 1

    def validation(self) -> dict[str, Batch[np.ndarray]]:
        """Return packed rows of the held-out pairs of each language.

        At most `evaluate.sequences` rows of a language (0: all), the same in every run.
        """
        limit = self.config.evaluate.sequences or None
        return {language: self._rows(rows[:limit]) for language, rows in self._validation.items()}

    def _sizes(self, pairs: Sequence[int]) -> list[int]:
        return [sum(sample.size for sample in self._pairs[i]) for i in pairs]

    def _pack_held_out(self) -> dict[str, list[list[int]]]:
        """Return the rows of the held-out pairs of each language, as indices of pairs."""
        result = {}
        for language, pairs in self._held_out.items():
            rows = best_fit(self._sizes(pairs), self.config.T)
            result[language] = [[pairs[i] for i in row] for row in rows]
        return result

    def _trained(self, row: Sequence[int]) -> list[int]:
        """Return the indices of the pairs of a row of the plan, which counts trained pairs only."""
        return [self._train[i] for i in row]

    def load_reference(
        self, is_main: bool, first: int, log_probs: Callable[[Batch], np.ndarray]
    ) -> None:
        """Set `reference`: from the run directory, or, at step 0, computed and saved there.

        `log_probs` returns the log-probability [B, S] of the segments of a batch under the initial
        weights; a collective. Raises `InputError` where a resumed run has lost its file.
        """
        path = Path(self.config.run.dir) / REFERENCE_FILE
        if first > 0:
            self.reference = self._saved(path, self.reference.shape)
            return
        packed, B = [self._trained(row) for row in self.plan.packed], self.config.train.batch_size
        packed += [row for rows in self._validation.values() for row in rows]
        for start in range(0, len(packed), B):
            rows = packed[start : start + B]
            found_BS = log_probs(self._rows(rows + [[]] * (B - len(rows))))
            for row, found_S in zip(rows, found_BS, strict=False):
                self.reference[row] = found_S[: 2 * len(row)].reshape(-1, 2)
        if is_main:
            self._save(path, self.reference)

    def check_reference(
        self, is_main: bool, first: int, log_probs: Callable[[Batch], np.ndarray]
    ) -> None:
        """Check that a live reference is that of the run's start, on its first batch.

        Its log-probabilities are in the run directory since step 0. Raises `InputError` if they
        differ by more than rounding does: the checkpoint `init.from` is another one now.
        """
        path = Path(self.config.run.dir) / REFERENCE_FILE
        _, rows = self.plan.rows(0)
        found_BS = log_probs(self._rows([self._trained(row) for row in rows]))
        if first == 0:
            if is_main:
                self._save(path, found_BS)
            return
        saved_BS = self._saved(path, found_BS.shape)
        if not np.allclose(found_BS, saved_BS, rtol=LIVE_TOLERANCE, atol=0.05):
            raise InputError(
                f"init.from {self.config.init.from_} is not the reference that this run began "
                "with; give back that checkpoint, or start a new run"
            )

    def _save(self, path: Path, log_probs: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"pairs": self._digest, "log_probs": log_probs.tolist()}
        write_atomically(path, json.dumps(values) + "\n")

    def _saved(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        if not path.is_file():
            raise InputError(
                f"{path} is missing: the reference of this run is lost; copy it from the run that "
                "wrote the checkpoint, or start a new run with --init.from"
            )
        try:
            saved = json.loads(path.read_text("utf-8"))
            pairs, values = saved["pairs"], np.array(saved["log_probs"], np.float64)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a file of reference log-probabilities") from error
        if pairs != self._digest or values.shape != shape:
            raise InputError(f"{path} belongs to other preference pairs; start a new run")
        return values

    @property
    def _digest(self) -> str:
        described = [self.description, self._validation]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def _rows(self, rows: Sequence[Sequence[int]]) -> Batch[np.ndarray]:
        """Return rows of pairs, of the same shape in all batches."""
        samples = [[sample for i in row for sample in self._pairs[i]] for row in rows]
        reference_BS = np.zeros((len(rows), self.n_segments))
        for number, row in enumerate(rows):
            reference_BS[number, : 2 * len(row)] = self.reference[list(row)].ravel()
        batch = make_rows(samples, self.config.T)._replace(reference=reference_BS)
        if not self._weights:
            return batch
        weights_BP = np.zeros((len(rows), self.n_segments // 2))
        for number, row in enumerate(rows):
            weights_BP[number, : len(row)] = [self._weights[i] for i in row]
        return batch._replace(weights=weights_BP)

    def _read(self, found: Iterator[Conversation]) -> dict[str, Any]:
        """Tokenize the pairs of a source; return the description of its training tokens."""
        first = len(self._train)
        # How the reference is computed is none of the data.
        settings = asdict(self.config.dpo)
        del settings["precompute_reference"]
        is_kto = self.config.dpo.loss == "kto"
        for one, held_out in self._split(found):
            if not is_kto and one.shape != "preference":
                raise InputError(
                    f"{one.where}: a record of shape {one.shape} is not a pair; dpo needs the "
                    "fields prompt, chosen and rejected (dpo.loss kto: prompt, completion, label)"
                )
            try:
                self._pairs.append(self._encode(one))
                self._weights += [self._weight(one)] if is_kto else []
                own = self._held_out.setdefault(one.language, []) if held_out else self._train
                own.append(len(self._pairs) - 1)
            except InputError as error:
                self.n_skipped += 1
                if self.n_skipped > self.config.dpo.max_skipped:
                    raise InputError(
                        f"{one.where}: {error} (pairs left out: {self.n_skipped}, dpo.max_skipped "
                        f"is {self.config.dpo.max_skipped})"
                    ) from error
        mine = [self._pairs[i] for i in self._train[first:]]
        digest = hashlib.sha256(repr(settings).encode())
        for sample in (sample for pair in mine for sample in pair):
            digest.update(np.stack([sample.tokens, sample.labels]).tobytes())
        return {
            "documents": len(mine),
            "tokens": sum(len(sample.tokens) for pair in mine for sample in pair),
            "shard_tokens": None,
            "sha256": digest.hexdigest(),
        }

    def _split(self, found: Iterator[Conversation]) -> Iterator[tuple[Conversation, bool]]:
        """Yield the pairs of a source, of KTO as answers with others, and which are held out."""
        fraction = self.config.data.validation_fraction
        marked = ((one, in_validation(_prompt_text(one), fraction)) for one in found)
        if self.config.dpo.loss != "kto":
            yield from marked
            return
        both = list(marked)
        for held_out in (False, True):
            part = [one for one, is_held_out in both if is_held_out is held_out]
            for one in _answers_with_others(part):
                yield one, held_out

    def _encode(self, one: Conversation) -> tuple[Sample, Sample]:
        """Return the samples of a pair; if they exceed a row, each is cut to half of it."""
        T = self.config.T
        pair = [encode_sample(self.tokenizer, one.prompt, answer) for answer in one.answers]
        if sum(sample.size for sample in pair) > T:
            self.n_cut += 1
            pair = [truncate(sample, T // 2) for sample in pair]
        if not all(sample.n_labels for sample in pair):
            raise InputError(
                f"an answer has no label in half of train.sequence_length {T}, which a pair shares"
            )
        is_pair = self.config.dpo.loss != "kto"
        if is_pair and np.array_equal(pair[0].tokens, pair[1].tokens):
            raise InputError("chosen equals rejected in the tokens that fit; the pair is useless")
        return pair[0], pair[1]

    def _weight(self, one: Conversation) -> float:
        dpo = self.config.dpo
        return dpo.desirable_weight if one.label else -dpo.undesirable_weight


def _prompt_text(one: Conversation) -> str:
    """Return the text of a prompt, without roles; of a pair without one, all of it."""
    return replace(one, answers=()).text() if one.prompt else one.text()


def _answers_with_others(found: list[Conversation]) -> Iterator[Conversation]:
    """Yield each answer of a source, with its label, next to the answer to another prompt.

    The other is that of the next record: KTO estimates its baseline with it. The chosen answer of a
    pair is desirable, the rejected one is not. Raises `InputError` for records without a label.
    """
    answers: list[Conversation] = []
    for one in found:
        if one.shape not in ("unpaired", "preference"):
            raise InputError(
                f"{one.where}: a record of shape {one.shape} has no label; dpo.loss kto needs the "
                "fields prompt, completion and label, or prompt, chosen and rejected"
            )
        labels = (one.label,) if one.shape == "unpaired" else (True, False)
        answers += [
            replace(one, answers=(answer,), label=label)
            for answer, label in zip(one.answers, labels, strict=True)
        ]
    for i, one in enumerate(answers):
        # Of a pair, the next record is two answers away.
        other = answers[(i + len(one.answers) + (one.shape == "preference")) % len(answers)]
        yield replace(one, answers=(*one.answers, *other.answers))

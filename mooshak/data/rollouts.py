"""Rollouts: sampled answers with their rewards, as records of a file and as training rows.

Shapes: B rows, T positions, S samples of a row, N samples.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.samples import Sample, make_rows
from mooshak.errors import InputError


@dataclass(frozen=True)
class Rollout:
    """A sampled answer to a prompt; a line of RUN/rollouts/STEP.jsonl."""

    where: str
    """Place of the prompt, for messages."""
    index: int
    """Number of the sample among those of the prompt."""
    prompt: str
    completion: str
    """Text without the end token."""
    reward: float
    advantage: float
    is_truncated: bool
    """True if the answer has no end token."""
    prompt_ids: list[int]
    completion_ids: list[int]
    """Sampled tokens with the end token, which are trained."""
    old_log_probs: list[float]
    """Log-probabilities of `completion_ids` under the model that sampled them, at the sampling
    temperature."""

    @property
    def sample(self) -> Sample:
        """Tokens, with labels on the sampled ones."""
        tokens = np.array(self.prompt_ids + self.completion_ids, np.int32)
        labels = tokens.copy()
        labels[: len(self.prompt_ids)] = IGNORE_INDEX
        return Sample(tokens, labels)


def make_policy_rows(
    rows: Sequence[Sequence[Rollout]], weights: Sequence[Sequence[float]], T: int
) -> Batch[np.ndarray]:
    """Return rows of samples with what the objective needs of each, arrays [B, T] and [B, S].

    `weights` has the weight of the tokens of each sample (`numerics.grpo.token_weights`).
    """
    batch = make_rows([[one.sample for one in row] for row in rows], T)
    advantages_BS = np.zeros((len(rows), max(1, *map(len, rows))))
    weights_BT, old_BT = np.zeros((2, *batch.labels.shape))
    for number, row in enumerate(rows):
        (places,) = np.nonzero(batch.labels[number] != IGNORE_INDEX)
        lengths = [len(one.completion_ids) for one in row]
        advantages_BS[number, : len(row)] = [one.advantage for one in row]
        old_BT[number, places] = [value for one in row for value in one.old_log_probs]
        weights_BT[number, places] = np.repeat(np.array(weights[number], np.float64), lengths)
    return batch._replace(weights=weights_BT, advantages=advantages_BS, old_log_probs=old_BT)


def with_log_probs(
    rollouts: Sequence[Rollout], labels_BT: np.ndarray, log_probs_BT: np.ndarray
) -> list[Rollout]:
    """Return samples, one a row, with their log-probabilities of the labels."""
    rows = zip(rollouts, labels_BT, log_probs_BT, strict=True)
    return [
        replace(one, old_log_probs=values_T[labels_T != IGNORE_INDEX].tolist())
        for one, labels_T, values_T in rows
    ]


def rollout_lines(rollouts: Sequence[Rollout]) -> str:
    """Return samples as JSONL; floating-point numbers keep all bits."""
    lines = (json.dumps(asdict(one), ensure_ascii=False) for one in rollouts)
    return "".join(f"{line}\n" for line in lines)


def parse_rollouts(text: str, name: Any) -> list[Rollout]:
    """Return the samples of JSONL. Raises `InputError`, with `name`, for other text."""
    try:
        # Not `splitlines`: JSON strings may contain other line breaks, such as U+2028.
        return [Rollout(**json.loads(line)) for line in text.split("\n") if line]
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is not a file of sampled answers: {error}") from error

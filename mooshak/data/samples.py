"""Samples: token ids of a conversation with the labels of its answers, and rows packed from them.

`encode_sample(tokenizer, prompt, answer)` is the one way from text to what is trained; objectives
on pairs of answers use it, too.

Shapes: B rows, T positions, S tokens of a sample.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import Messages
from mooshak.tokenizer.chat_turns import Turn, encode_completion, encode_turn

Text = str | Messages
"""A prompt or an answer: a text, which no template changes, or messages."""


class Sample(NamedTuple):
    """Tokens that are read in one row, and which of them are trained."""

    tokens: np.ndarray
    """int32 [S]."""
    labels: np.ndarray
    """int32 [S]: the token itself where it is trained (answers and their end tokens), else
    `IGNORE_INDEX`. Not shifted: `make_rows` shifts."""

    @property
    def size(self) -> int:
        """Positions that the sample takes in a row: the last token is a label only."""
        return len(self.tokens) - 1

    @property
    def n_labels(self) -> int:
        """Number of trained tokens."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


def encode_sample(tokenizer: Tokenizer, prompt: Text, answer: Text) -> Sample:
    """Return the tokens of a prompt and its answer, with labels on the answer and its end token.

    Both are texts, or both are messages, of which `answer` has those to train on. Raises
    `InputError` if it has no label, or takes several samples: see `encode_samples`.
    """
    samples = encode_samples(tokenizer, prompt, answer)
    if len(samples) > 1:
        raise InputError(
            "the chat template rewrites earlier turns, so the answers cannot be one sample; end "
            "the prompt before the last answer"
        )
    return samples[0]


def encode_samples(tokenizer: Tokenizer, prompt: Text, answer: Text) -> list[Sample]:
    """Return the samples of a conversation, with labels on the assistant's turns of `answer`.

    That is one, or one for each turn if the chat template rewrites earlier turns: in each sample,
    the ids before an answer are those of the prompt that `encode_turn` returns. Raises `InputError`
    if there is no answer, or an answer is empty.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return [_join([encode_completion(tokenizer, prompt, answer)])]
    if isinstance(prompt, str) or isinstance(answer, str):
        raise InputError("prompt and answer must both be texts, or both messages")
    messages = [*prompt, *answer]
    ends = range(len(prompt) + 1, len(messages) + 1)
    turns = [
        encode_turn(tokenizer, messages[:end])
        for end in ends
        if messages[end - 1].get("role") == "assistant"
    ]
    if not turns:
        raise InputError("the conversation has no turn of the assistant: nothing to train on")
    groups = [[turns[0]]]
    for turn in turns[1:]:
        before = groups[-1][-1].prompt + groups[-1][-1].answer
        if turn.prompt[: len(before)] == before:
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return [_join(group) for group in groups]


def _join(turns: Sequence[Turn]) -> Sample:
    """Return the sample of turns, each of which begins with the one before."""
    tokens = np.array(turns[-1].prompt + turns[-1].answer, np.int32)
    labels = np.full_like(tokens, IGNORE_INDEX)
    for prompt, answer in turns:
        labels[len(prompt) : len(prompt) + len(answer)] = answer
    labels[0] = IGNORE_INDEX  # Nothing predicts the first token.
    return Sample(tokens, labels)


def truncate(sample: Sample, T: int) -> Sample:
    """Return the part of a sample that fits into T positions."""
    return Sample(sample.tokens[: T + 1], sample.labels[: T + 1])


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the rows of best-fit-decreasing packing (arXiv:2404.10830), as lists of indices.

    Each item goes to the fullest row that has room for it; the largest first, those of equal size
    in the given order. Sizes are at most `capacity`.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    """Room that is left -> rows."""
    rooms = 0  # Bit r is set where `with_room[r]` is not empty: the smallest sufficient is a shift.
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if wide_enough := rooms >> sizes[item]:
            room = sizes[item] + (wide_enough & -wide_enough).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        left = room - sizes[item]
        with_room[left].append(row)
        rooms |= 1 << left
    return rows


def make_rows(
    rows: Sequence[Sequence[Sample]], T: int, pad_left: bool = False
) -> Batch[np.ndarray]:
    """Return rows of samples as a batch of int32 [B, T]; the rest of a row is padding.

    Samples do not see each other, nor the padding (token 0, segment 0, no label).
    """
    shape = len(rows), T
    batch = Batch(np.zeros(shape, np.int32), np.full(shape, IGNORE_INDEX, np.int32),
                  np.zeros(shape, np.int32), np.zeros(shape, np.int32))  # fmt: skip
    assert batch.segments is not None and batch.positions is not None
    for row, samples in enumerate(rows):
        start = T - sum(sample.size for sample in samples) if pad_left else 0
        for number, sample in enumerate(samples, 1):
            here = slice(start, start + sample.size)
            batch.tokens[row, here] = sample.tokens[:-1]
            batch.labels[row, here] = sample.labels[1:]
            batch.segments[row, here] = number
            batch.positions[row, here] = np.arange(sample.size)
            start += sample.size
    return batch

"""Held-out preference pairs: means over them, and which answer a model finds likelier."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mooshak.data.conversations import Conversation
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.samples import encode_sample
from mooshak.generation.lm import LM
from mooshak.numerics.preference import ACCURACY


def preference_metrics(
    evaluate: Callable[[Batch], Mapping[str, float]], validation: Mapping[str, Batch]
) -> dict[str, float]:
    """Return `validation_loss` and `validation_{metric}` of all pairs, and accuracies by language.

    `evaluate` returns the sums of the loss and of each metric over the pairs of a batch.
    """
    sums = {language: evaluate(batch) for language, batch in validation.items()}
    n_pairs = {language: count_pairs(batch) for language, batch in validation.items()}
    total = sum(n_pairs.values())
    names = dict.fromkeys(name for found in sums.values() for name in found)
    means = {
        f"validation_{name}": sum(found[name] for found in sums.values()) / total for name in names
    }
    by_language = {
        f"validation_{ACCURACY}_{language}": found[ACCURACY] / n_pairs[language]
        for language, found in sums.items()
    }
    return means | by_language


def preference_accuracy(lm: LM, pairs: Sequence[Conversation]) -> dict[str, dict[str, float]]:
    """Return `preference_accuracy` and `pairs` by language.

    That is the share of the pairs whose chosen answer has the larger log p(answer | prompt), summed
    over its tokens; no reference is involved.
    """
    assert lm.tokenizer is not None
    right: dict[str, list[bool]] = {}
    for one in pairs:
        samples = [encode_sample(lm.tokenizer, one.prompt, answer) for answer in one.answers]
        chosen, rejected = (
            lm.score(sample.tokens.tolist())[sample.labels[1:] != IGNORE_INDEX].sum()
            for sample in samples
        )
        right.setdefault(one.language, []).append(bool(chosen > rejected))
    return {
        language: {"preference_accuracy": sum(found) / len(found), "pairs": len(found)}
        for language, found in right.items()
    }


def count_pairs(batch: Batch[np.ndarray]) -> int:
    """Return the number of pairs of a batch: of segments 2 k + 1 that have a label."""
    assert batch.segments is not None
    rows, places = np.nonzero((batch.labels != IGNORE_INDEX) & (batch.segments % 2 == 1))
    return len(np.unique(np.stack([rows, batch.segments[rows, places]]), axis=1).T)

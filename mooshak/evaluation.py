"""Bits per byte, and the unigram coder that a model has to beat."""

import math
from collections.abc import Callable, Mapping

import numpy as np


def validation_metrics(
    evaluate: Callable[[np.ndarray], float],
    validation: Mapping[str, np.ndarray],
    token_bytes_V: np.ndarray,
) -> dict[str, float]:
    """`validation_loss` per token over all languages, and `bits_per_byte_{language}` of each.

    `evaluate` gives the summed cross entropy in nats of sequences [N, T + 1].
    """
    nats = {language: evaluate(sequences) for language, sequences in validation.items()}
    n_tokens = sum(sequences[:, 1:].size for sequences in validation.values())
    return {
        "validation_loss": sum(nats.values()) / n_tokens,
        **{
            f"bits_per_byte_{language}": bits_per_byte(nats[language], sequences, token_bytes_V)
            for language, sequences in validation.items()
        },
    }


def bits_per_byte(nats: float, sequences_NT: np.ndarray, token_bytes_V: np.ndarray) -> float:
    """Code length of all tokens but the first of each sequence, in bits per byte of their text.

    `nats` is their summed cross entropy. Comparable between tokenizers, as loss per token is not.
    """
    return nats / math.log(2) / int(token_bytes_V[sequences_NT[:, 1:]].sum(dtype=np.int64))


def unigram_nats(counts_V: np.ndarray, sequences_NT: np.ndarray) -> float:
    """Cross entropy in nats of the same tokens under the training text's token frequencies.

    `counts_V` are the counts of the tokens in training; one is added to each (Laplace).
    """
    log_p_V = np.log(counts_V + 1.0) - math.log(counts_V.sum() + len(counts_V))
    return float(-log_p_V[sequences_NT[:, 1:]].sum())

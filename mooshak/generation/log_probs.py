"""Log-probabilities of tokens, as both frameworks return them.

Shapes: B rows, or the tokens of a text; N most probable tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class TokenLogProbs(NamedTuple):
    """Log-probabilities of tokens, and the most probable tokens in their places; in nats."""

    log_prob_B: np.ndarray
    """float64 [B]."""
    top_BN: np.ndarray | None = None
    """Ids of the most probable tokens, in descending order, equal ones by id; None: not asked."""
    top_log_prob_BN: np.ndarray | None = None

    def top(self, i: int, n: int) -> dict[int, float]:
        """Return the n most probable tokens of row i; fewer if the others have no probability."""
        assert self.top_BN is not None and self.top_log_prob_BN is not None
        pairs = zip(self.top_BN[i, :n].tolist(), self.top_log_prob_BN[i, :n].tolist(), strict=True)
        return {token: log_prob for token, log_prob in pairs if log_prob > -math.inf}


def join_log_probs(parts: Sequence[TokenLogProbs], end: int) -> TokenLogProbs:
    """Return the rows of all parts up to `end`."""
    log_probs, tops, top_log_probs = zip(*parts, strict=True)
    if tops[0] is None:
        return TokenLogProbs(np.concatenate(log_probs)[:end])
    return TokenLogProbs(*(np.concatenate(a)[:end] for a in (log_probs, tops, top_log_probs)))

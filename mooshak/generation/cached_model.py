"""A model with the KV caches of a batch, as beam search and speculative decoding use it.

The frameworks implement it: mooshak_torch/cached_model.py and mooshak_jax/cached_model.py.
Shapes: B rows, N tokens of a call, M of them with logits, V vocabulary, P prompts, W beams of each
prompt (B = P * W), C candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mooshak.config.generate import GenerateConfig
from mooshak.generation.adjustments import Adjustments
from mooshak.generation.log_probs import TokenLogProbs


class Candidates(NamedTuple):
    """The best continuations of the beams of each prompt, in descending order; arrays [P, C]."""

    beam_PC: np.ndarray
    """int64, 0 .. W - 1."""
    token_PC: np.ndarray
    """int64."""
    score_PC: np.ndarray
    """float64: the sum of the beam's score and the adjusted log-probability of the token."""
    log_prob_PC: np.ndarray
    """float64: log p(token) under the model, not adjusted."""


class CachedModel(Protocol):
    """A model and its KV caches. It starts with prompts, and the logits after each of them.

    The logits of the latest call, [B, M, V], stay on the device. Adjustments have B * M rows: all
    positions of the first row come first.
    """

    def extend(self, tokens_BN: np.ndarray, positions_BN: np.ndarray, n_logits: int) -> None:
        """Compute the logits of the last `n_logits` tokens, and cache keys and values of all.

        A row may be padded by copies of its last token, at the same position.
        """

    def propose(
        self, tokens_BN: np.ndarray, positions_BN: np.ndarray, last_B: np.ndarray, n: int
    ) -> np.ndarray:
        """Return the next `n` greedy tokens of each row, int64 [B, M], without adjustments.

        The tokens are read as by `extend`, then all new ones but the last, none at a position
        beyond `last_B`: what follows there is not to be used.
        """

    def select(self, rows: Sequence[int]) -> None:
        """Reorder the caches: row i becomes the old row rows[i]."""

    def truncate(self, lengths: Sequence[int]) -> None:
        """Drop the tokens of each row beyond its new length."""

    def sample(
        self,
        uniform_BM: np.ndarray,
        settings: GenerateConfig,
        adjustments: Adjustments | None = None,
    ) -> np.ndarray:
        """Return the token that follows at each position, int64 [B, M]."""

    def log_probs(
        self,
        tokens_BM: np.ndarray,
        settings: GenerateConfig,
        adjustments: Adjustments | None = None,
    ) -> TokenLogProbs:
        """Return the log-probabilities that the settings ask for, of a token at each position.

        They have B * M rows: all positions of the first row come first.
        """

    def best(
        self, score_B: np.ndarray, n_beams: int, n: int, adjustments: Adjustments | None = None
    ) -> Candidates:
        """Return the `n` best continuations of each prompt; fewer if there are fewer tokens.

        `score_B` are the scores of the beams; minus infinity for a row without one. Of equal
        scores, those of the first beams and the smallest token ids are better.
        """

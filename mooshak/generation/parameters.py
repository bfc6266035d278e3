"""Settings of sampling as arrays: one number for each row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mooshak.config.generate import GenerateConfig


@dataclass(frozen=True)
class SamplingParameters:
    """Settings that act on the distribution of the next token; arrays [B]."""

    temperature_B: np.ndarray
    """float64; 0 is greedy."""
    top_k_B: np.ndarray
    """int64; 0 keeps all tokens."""
    top_p_B: np.ndarray
    min_p_B: np.ndarray
    typical_p_B: np.ndarray
    """float64; 1 (min_p: 0) keeps all tokens."""

    @classmethod
    def of(cls, rows: Sequence[GenerateConfig]) -> "SamplingParameters":
        """Return the settings of each row."""
        columns = {
            name: np.array([getattr(row, name) for row in rows], np.float64)
            for name in ("temperature", "top_p", "min_p", "typical_p")
        }
        top_k_B = np.array([row.top_k for row in rows], np.int64)
        return cls(top_k_B=top_k_B, **{f"{name}_B": values for name, values in columns.items()})

    @property
    def is_greedy(self) -> bool:
        """True if no row is sampled."""
        return not self.temperature_B.any()

    @property
    def uses_order(self) -> bool:
        """True if a row keeps its most probable tokens only: top_k or top_p."""
        return bool(self.top_k_B.any() or (self.top_p_B < 1).any())

    @property
    def uses_min_p(self) -> bool:
        """True if a row has min_p."""
        return bool(self.min_p_B.any())

    @property
    def uses_typical_p(self) -> bool:
        """True if a row has typical_p."""
        return bool((self.typical_p_B < 1).any())

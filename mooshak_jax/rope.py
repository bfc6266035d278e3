"""Rotary position embedding: position ids and their cos/sin. Mirror: mooshak_torch/rope.py.

Shapes: B batch, T time, S time of the keys, H heads, K head width, k half of K.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mooshak.config.model import ModelConfig
from mooshak.numerics.rope import rope_tables
from mooshak_jax.ops.activations import rotate


class Positions(NamedTuple):
    """Position ids, their RoPE cos/sin, and masks; shared by all layers."""

    index_BT: Array
    """Position id of each token."""
    cos_BT1k: Array
    sin_BT1k: Array
    segments_BT: Array | None = None
    """Documents of packed rows, as runs of equal integers; attention stays within a document."""
    mask_BTS: Array | None = None
    """True where a query sees a cache slot 0 .. S - 1. None: empty caches."""


class Rope(nnx.Module):
    """Rotary position embedding (arXiv:2104.09864), rotate-half layout, in at least float32."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        # Static: constants of the compiled step, not state of the model.
        self.tables = _Tables(*(table.astype(dtype) for table in rope_tables(model)))

    def lookup(self, index_BT: Array) -> Positions:
        """Return the position ids with their RoPE cos/sin."""
        cos, sin = (jnp.asarray(table)[index_BT] for table in (self.tables.cos, self.tables.sin))
        return Positions(index_BT, cos[:, :, None], sin[:, :, None])

    def __call__(self, x_BTHK: Array, positions: Positions) -> Array:
        return rotate(x_BTHK, positions.cos_BT1k, positions.sin_BT1k)


class _Tables:
    """NumPy arrays as static data of a graph definition: compared and hashed by content."""

    def __init__(self, cos: np.ndarray, sin: np.ndarray):
        self.cos, self.sin = cos, sin
        self._key = (cos.dtype.str, cos.shape, cos.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tables) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

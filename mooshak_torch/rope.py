"""Rotary position embedding: position ids and their cos/sin. Mirror: mooshak_jax/rope.py.

Shapes: B batch, T time, S time of the keys, H heads, K head width, k half of K.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mooshak.config.model import ModelConfig
from mooshak.numerics.rope import rope_tables
from mooshak_torch.ops.activations import rotate


class Positions(NamedTuple):
    """Position ids, their RoPE cos/sin, and masks; shared by all layers."""

    index_BT: Tensor
    """Position id of each token."""
    cos_BT1K: Tensor
    sin_BT1K: Tensor
    """Negated in the first half."""
    segments_BT: Tensor | None = None
    """Documents of packed rows, as runs of equal integers; attention stays within a document."""
    mask_BTS: Tensor | None = None
    """Added to the attention scores, 0 or -inf: of cache slots 0 .. S - 1, or of packed rows."""


class Rope(nn.Module):
    """Rotary position embedding (arXiv:2104.09864), rotate-half layout, in at least float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        cos, sin = rope_tables(model)
        self.register_buffer("cos", torch.tensor(cos, dtype=dtype), persistent=False)
        self.register_buffer("sin", torch.tensor(sin, dtype=dtype), persistent=False)

    def lookup(self, index_BT: Tensor) -> Positions:
        """Return the position ids with their RoPE cos/sin."""
        cos_BT1k, sin_BT1k = (table[index_BT].unsqueeze(2) for table in (self.cos, self.sin))
        cos_BT1K = torch.cat((cos_BT1k, cos_BT1k), dim=-1)
        return Positions(index_BT, cos_BT1K, torch.cat((-sin_BT1k, sin_BT1k), dim=-1))

    def forward(self, x_BTHK: Tensor, positions: Positions) -> Tensor:
        return rotate(x_BTHK, positions.cos_BT1K, positions.sin_BT1K)

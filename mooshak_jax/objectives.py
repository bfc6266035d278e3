"""Training objectives of the JAX model."""

from typing import Any

from flax import nnx
from jax import Array

from mooshak_jax.model import Model
from mooshak_jax.ops.cross_entropy import cross_entropy
from mooshak_jax.params import merge


def objective(graphdef: nnx.GraphDef, chunk: int, params: Any, batch_BS: Array) -> Array:
    """Summed cross entropy in nats of tokens 1 .. S - 1, each given those before it."""
    model: Model = merge(graphdef, params)
    hidden_BTD = model.hidden_states(batch_BS[:, :-1])
    return cross_entropy(hidden_BTD, model.head_DV, batch_BS[:, 1:], chunk)

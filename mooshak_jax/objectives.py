"""Training objectives: the loss of a step, as an unreduced sum and its denominator.

Mirror: mooshak_torch/objectives.py. Shapes: B batch, T time, D model width.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak_jax.model import Model
from mooshak_jax.ops.cross_entropy import cross_entropy
from mooshak_jax.params import make_graphdef, merge


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: the cross entropy of the labels that are not ignored."""

    graphdef: nnx.GraphDef
    chunk: int

    def prepare(self, batch: Batch[Array]) -> int | Array:
        """Return the denominator: the number of labels in the global batch, at least 1.

        With document masks ignored labels do not count. Rows without masks have no ignored labels:
        the number follows from the shape.
        """
        if batch.segments is None:
            return batch.labels.size
        return jnp.maximum(1, jnp.sum(batch.labels != IGNORE_INDEX))

    def __call__(self, params: Any, batch: Batch[Array]) -> Array:
        """Return the summed cross entropy of some rows of the global batch, in nats."""
        model: Model = merge(self.graphdef, params)
        hidden_BTD = model.hidden_states(batch.tokens, **batch.context)
        return cross_entropy(hidden_BTD, model.head_DV, batch.labels, self.chunk)


def make_objective(model: ModelConfig, config: Config) -> CausalLM:
    """Return the objective with its activation checkpointing."""
    graphdef = make_graphdef(model, config.train.dtype, config.train.remat)
    return CausalLM(graphdef, config.train.loss_chunk)

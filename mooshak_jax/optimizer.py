"""AdamW with decay on matrices only, and clipping by the global norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mooshak.config import OptimizerConfig
from mooshak.schedule import decays
from mooshak_jax.checkpoint import canonical_name


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) without the learning rate, which `apply_updates` multiplies in."""
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def decay_mask(params: Any) -> Any:
    """True where weight decay applies."""
    return jax.tree.map_with_path(lambda path, _: decays(canonical_name(path)), params)


def apply_updates(params: Any, updates: Any, learning_rate: Array) -> Any:
    """params - learning_rate * updates, in the dtype of the parameters."""
    return jax.tree.map(lambda p, u: p - learning_rate.astype(p.dtype) * u, params, updates)


def clip_gradients(grads: Any, max_norm: float) -> tuple[Any, Array]:
    """The gradients times max_norm / max(norm, max_norm), and their global norm."""
    norm = optax.global_norm(grads)
    scale = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda g: g * scale, grads), norm

"""AdamW with weight decay on matrices only, and clipping by the global norm.

Mirror: mooshak_torch/optimizer.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mooshak.config.sections import OptimizerConfig
from mooshak.numerics.schedule import has_weight_decay
from mooshak_jax.param_names import canonical_tensors


def adamw(state: dict[str, Any], grads: Any, learning_rate: Array, config: OptimizerConfig) -> dict:
    """Return the state after one step of AdamW (arXiv:1711.05101).

    A state has the trees `params`, `exp_avg` and `exp_avg_sq`, and `step`, the steps done. They
    hold the trained parameters only, as do the gradients.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    old = optax.ScaleByAdamState(state["step"], state["exp_avg"], state["exp_avg_sq"])
    updates, new = adam.update(grads, old)

    def apply(path: tuple, parameter: Array, update: Array) -> Array:
        decay = (
            config.weight_decay
            if has_weight_decay(canonical_tensors(path, parameter.shape)[0].name)
            else 0.0
        )
        return parameter - learning_rate.astype(parameter.dtype) * (update + decay * parameter)

    params = jax.tree.map_with_path(apply, state["params"], updates)
    return {"params": params, "exp_avg": new.mu, "exp_avg_sq": new.nu, "step": new.count}


def clip_gradients(grads: Any, max_norm: float | None) -> tuple[Any, Array]:
    """Return the gradients times max_norm / max(norm, max_norm), and their global norm.

    None does not clip.
    """
    norm = optax.tree.norm(grads)
    if max_norm is None:
        return grads, norm
    scale = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda g: g * scale, grads), norm

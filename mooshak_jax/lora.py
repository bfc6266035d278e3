"""Low-rank adapters (LoRA, arXiv:2106.09685) of the matrices of a layer.

Mirror: mooshak_torch/lora.py. The adapters are children of the linear layer that they change.
Shapes: B batch, T time, I contracted width, O output width, R rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mooshak.config.lora import TARGETS, LoraConfig, is_target
from mooshak_jax.distributed.sharding import Axes
from mooshak_jax.ops.matmul import einsum, linear


class Matrix(nnx.Module):
    """One of the two matrices of an adapter. Kernel [in, out]."""

    def __init__(self, n_in: int, n_out: int, dtype: jnp.dtype, axes: Axes):
        self.kernel = nnx.Param(jnp.zeros((n_in, n_out), dtype), axes=axes)


def set_adapters(block: Any, lora: LoraConfig, compute: jnp.dtype) -> None:
    """Add adapters to the linear layers of a block.

    Adapters have the dtype of the parameters. The block's own matrices are not trained, and are
    converted to the compute dtype.
    """
    for name, group in TARGETS.items():
        layer: Any = getattr(getattr(block, group), name, None)
        if layer is None:
            continue
        if is_target(lora, name):
            (n_in, n_out), dtype, (first, last) = layer.kernel.shape, layer.kernel.dtype, layer.axes
            layer.lora = lora
            layer.lora_a = Matrix(n_in, lora.rank, dtype, (first, None))
            layer.lora_b = Matrix(lora.rank, n_out, dtype, (None, last))
            if lora.dora:
                layer.dora_magnitude = nnx.Param(jnp.ones((n_out,), dtype), axes=(last,))
        for value in filter(None, (layer.kernel, layer.bias)):
            value.set_value(value[...].astype(compute))


def set_token_rows(module: Any, lora: LoraConfig | None) -> None:
    """Add the trained rows of some tokens to a table: the embedding, or the output head."""
    if lora is not None and lora.trainable_token_indices:
        is_head = hasattr(module, "kernel")
        like = module.kernel[...].T if is_head else module.embedding[...]
        module.token_ids = tuple(lora.trainable_token_indices)
        shape = len(module.token_ids), like.shape[1]
        module.token_rows = nnx.Param(jnp.zeros(shape, like.dtype), axes=(None, "embed"))


def table_of(module: Any) -> Array:
    """Return the table [V, D] of an embedding, or the kernel [D, V] of an output head.

    With its trained rows.
    """
    is_head = hasattr(module, "kernel")
    weight: Array = module.kernel[...] if is_head else module.embedding[...]
    if not module.token_ids:
        return weight
    ids, rows_ND = jnp.array(module.token_ids), module.token_rows[...]
    return weight.at[:, ids].set(rows_ND.T) if is_head else weight.at[ids].set(rows_ND)


def look_up(tokens_BT: Array, module: Any) -> Array:
    """Return the rows [B, T, D] of tokens in an embedding, those of trained tokens included."""
    x_BTD: Array = module.embedding[...][tokens_BT]
    if not module.token_ids:
        return x_BTD
    # Not from `table_of`: no copy of the table is needed for some of its rows.
    is_trained_BTN = tokens_BT[..., None] == jnp.array(module.token_ids)
    own_BTD = module.token_rows[...][is_trained_BTN.argmax(-1)]
    return jnp.where(is_trained_BTN.any(-1, keepdims=True), own_BTD, x_BTD)


def add_adapter(y_BTO: Array, x_BTI: Array, layer: Any, lora: LoraConfig) -> Array:
    """Return the output of an adapted linear layer, [B, T, O], from y = x w without adapter.

    It is y + s x a b, where s is `lora.scale`; with DoRA (arXiv:2402.09353) times
    magnitude / |w + s a b|, the norm of each column, which is a constant for the gradients, as in
    PEFT.
    """
    (first, last), a_IR, b_RO = layer.axes, layer.lora_a.kernel[...], layer.lora_b.kernel[...]
    low_BTR = linear(x_BTI, a_IR, None, (first, None))
    y_BTO = y_BTO + linear(low_BTR, b_RO, None, (None, last)) * lora.scale
    if not lora.dora:
        return y_BTO
    norm_O = _merged_norm(layer.kernel[...], a_IR, b_RO, lora)
    return y_BTO * (layer.dora_magnitude[...] / norm_O).astype(y_BTO.dtype)


def _merged_norm(w_IO: Array, a_IR: Array, b_RO: Array, lora: LoraConfig) -> Array:
    """Return the norm [O] of each column of w + s a b, in the dtype of the adapters."""
    merged_IO = w_IO.astype(b_RO.dtype) + einsum("IR,RO->IO", a_IR, b_RO) * lora.scale
    return jax.lax.stop_gradient(jnp.linalg.norm(merged_IO, axis=0))

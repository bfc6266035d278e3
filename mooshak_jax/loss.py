"""Cross entropy that never holds the logits of more than a chunk of tokens.

The gradients are made in the forward pass, chunk by chunk, so no logits are kept or made twice.
Shapes: N tokens, C tokens of a chunk, D model width, V vocabulary. A kernel is [D, V].
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from mooshak_jax.model import PRECISION

IGNORE = -100


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x_ND: Array, w_DV: Array, labels_N: Array, chunk: int) -> Array:
    """Sum of -log p(label) over the tokens, in nats; labels of `IGNORE` count nothing.

    `x_ND` are hidden states in the compute dtype and `w_DV` the output head, whose dtype (at least
    float32) is that of the softmax and of the sum. The caller divides by the number of labels.
    """
    return _chunked(x_ND, w_DV, labels_N, chunk, differentiate=False)[0]


def _chunked(
    x_ND: Array, w_DV: Array, labels_N: Array, chunk: int, differentiate: bool
) -> tuple[Array, Array | None, Array | None]:
    narrow_DV = w_DV.astype(x_ND.dtype)
    dot = partial(jnp.matmul, precision=PRECISION)

    def one_chunk(carry: tuple, inputs: tuple[Array, Array]) -> tuple[tuple, Array | None]:
        total, dw_DV = carry
        x_CD, labels_C = inputs
        counts_C = labels_C != IGNORE
        targets_C1 = jnp.where(counts_C, labels_C, 0)[:, None]
        logits_CV = dot(x_CD, narrow_DV).astype(w_DV.dtype)
        log_z_C1 = jax.nn.logsumexp(logits_CV, axis=1, keepdims=True)
        losses_C1 = log_z_C1 - jnp.take_along_axis(logits_CV, targets_C1, axis=1)
        total += jnp.sum(losses_C1[:, 0] * counts_C)
        if not differentiate:
            return (total, None), None
        # d loss / d logits = softmax - one_hot(label).
        one_hot_CV = targets_C1 == jnp.arange(w_DV.shape[1])
        d_CV = (jnp.exp(logits_CV - log_z_C1) - one_hot_CV) * counts_C[:, None]
        d_CV = d_CV.astype(x_ND.dtype)
        return (total, dw_DV + dot(x_CD.T, d_CV).astype(w_DV.dtype)), dot(d_CV, narrow_DV.T)

    n, width = x_ND.shape
    chunk = min(chunk, n)
    padding = -n % chunk
    x_nCD = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(-1, chunk, width)
    labels_nC = jnp.pad(labels_N, (0, padding), constant_values=IGNORE).reshape(-1, chunk)
    start = (jnp.zeros((), w_DV.dtype), jnp.zeros_like(w_DV) if differentiate else None)
    (total, dw_DV), dx_nCD = jax.lax.scan(one_chunk, start, (x_nCD, labels_nC))
    return total, None if dx_nCD is None else dx_nCD.reshape(-1, width)[:n], dw_DV


def _forward(
    x_ND: Array, w_DV: Array, labels_N: Array, chunk: int
) -> tuple[Array, tuple[Array | None, Array | None]]:
    total, dx_ND, dw_DV = _chunked(x_ND, w_DV, labels_N, chunk, differentiate=True)
    return total, (dx_ND, dw_DV)


def _backward(
    chunk: int, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array, Array, None]:
    dx_ND, dw_DV = residuals
    return (dx_ND * grad).astype(dx_ND.dtype), dw_DV * grad, None


cross_entropy.defvjp(_forward, _backward)

"""Cross entropy that never holds the logits of more than a chunk of positions.

The gradients are made in the forward pass, chunk by chunk, so no logits are kept or made twice.
Shapes: B batch, T time, C positions of a chunk, n chunks, D model width, V vocabulary. Chunks cut
the time, not the batch: a batch that is sharded stays so.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from mooshak_jax.model import PRECISION

IGNORE = -100


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int) -> Array:
    """Sum of -log p(label) over the tokens, in nats; labels of `IGNORE` count nothing.

    `x_BTD` are hidden states in the compute dtype and `w_DV` the output head, whose dtype (at least
    float32) is that of the softmax and of the sum. `chunk` is the number of tokens whose logits are
    in memory at once. The caller divides by the number of labels.
    """
    return _chunked(x_BTD, w_DV, labels_BT, chunk, differentiate=False)[0]


def _chunked(
    x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int, differentiate: bool
) -> tuple[Array, Array | None, Array | None]:
    narrow_DV = w_DV.astype(x_BTD.dtype)
    einsum = partial(jnp.einsum, precision=PRECISION)

    def one_chunk(carry: tuple, inputs: tuple[Array, Array]) -> tuple[tuple, Array | None]:
        total, dw_DV = carry
        x_BCD, labels_BC = inputs
        counts_BC1 = (labels_BC != IGNORE)[..., None]
        targets_BC1 = jnp.where(counts_BC1, labels_BC[..., None], 0)
        logits_BCV = einsum("BCD,DV->BCV", x_BCD, narrow_DV).astype(w_DV.dtype)
        log_z_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
        losses_BC1 = log_z_BC1 - jnp.take_along_axis(logits_BCV, targets_BC1, axis=-1)
        total += jnp.sum(losses_BC1 * counts_BC1)
        if not differentiate:
            return (total, None), None
        # d loss / d logits = softmax - one_hot(label).
        one_hot_BCV = targets_BC1 == jnp.arange(w_DV.shape[1])
        d_BCV = (jnp.exp(logits_BCV - log_z_BC1) - one_hot_BCV) * counts_BC1
        d_BCV = d_BCV.astype(x_BTD.dtype)
        dw_DV += einsum("BCD,BCV->DV", x_BCD, d_BCV).astype(w_DV.dtype)
        return (total, dw_DV), einsum("BCV,DV->BCD", d_BCV, narrow_DV)

    B, T, D = x_BTD.shape
    step = min(max(1, chunk // B), T)
    padding = -T % step
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
    labels_BT = jnp.pad(labels_BT, ((0, 0), (0, padding)), constant_values=IGNORE)
    x_nBCD = x_BTD.reshape(B, -1, step, D).swapaxes(0, 1)
    labels_nBC = labels_BT.reshape(B, -1, step).swapaxes(0, 1)
    start = (jnp.zeros((), w_DV.dtype), jnp.zeros_like(w_DV) if differentiate else None)
    (total, dw_DV), dx_nBCD = jax.lax.scan(one_chunk, start, (x_nBCD, labels_nBC))
    if dx_nBCD is None:
        return total, None, None
    return total, dx_nBCD.swapaxes(0, 1).reshape(B, -1, D)[:, :T], dw_DV


def _forward(
    x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int
) -> tuple[Array, tuple[Array | None, Array | None]]:
    total, dx_BTD, dw_DV = _chunked(x_BTD, w_DV, labels_BT, chunk, differentiate=True)
    return total, (dx_BTD, dw_DV)


def _backward(chunk: int, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array, None]:
    dx_BTD, dw_DV = residuals
    return (dx_BTD * grad).astype(dx_BTD.dtype), dw_DV * grad, None


cross_entropy.defvjp(_forward, _backward)

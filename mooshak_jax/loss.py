"""Cross entropy that never holds the logits of more than a chunk of positions.

The gradients are made in the forward pass, chunk by chunk, so no logits are kept or made twice.
Shapes: B batch, N parts of it on devices of their own, T time, C positions of a chunk, n chunks,
D model width, V vocabulary. Chunks cut the time, not the batch: a batch that is cut stays so, the
output head is gathered once for all chunks, and its gradient is summed over the devices once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from mooshak_jax.model import product
from mooshak_jax.parallel import Axes, constrain, gather, row_shards

IGNORE = -100
HEAD: Axes = ("embed", "vocab")
"""Logical axes of the output head."""


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
    narrow_DV = gather(w_DV, x_BTD.dtype, HEAD)

    def one_chunk(carry: tuple, inputs: tuple[Array, Array]) -> tuple[tuple, Array | None]:
        total, dw_NDV = carry
        x_NBCD, labels_NBC = inputs
        counts_NBC1 = (labels_NBC != IGNORE)[..., None]
        targets_NBC1 = jnp.where(counts_NBC1, labels_NBC[..., None], 0)
        one_hot_NBCV = targets_NBC1 == jnp.arange(w_DV.shape[1])
        logits_NBCV = product("NBCD,DV->NBCV", x_NBCD, narrow_DV)
        log_z_NBC1 = jax.nn.logsumexp(logits_NBCV, axis=-1, keepdims=True)
        # A sum of one number and zeros: a vocabulary that is cut cannot be indexed into.
        own_NBC1 = jnp.sum(jnp.where(one_hot_NBCV, logits_NBCV, 0), axis=-1, keepdims=True)
        total += jnp.sum((log_z_NBC1 - own_NBC1) * counts_NBC1)
        if not differentiate:
            return (total, None), None
        # d loss / d logits = softmax - one_hot(label).
        d_NBCV = (jnp.exp(logits_NBCV - log_z_NBC1) - one_hot_NBCV) * counts_NBC1
        d_NBCV = d_NBCV.astype(x_BTD.dtype)
        dw_NDV += product("NBCD,NBCV->NDV", x_NBCD, d_NBCV)
        dx_NBCD = product("NBCV,DV->NBCD", d_NBCV, narrow_DV).astype(x_BTD.dtype)
        return (total, constrain(dw_NDV, "batch", None, "vocab")), dx_NBCD

    B, T, D = x_BTD.shape
    N = row_shards() if B % row_shards() == 0 else 1
    step = min(max(1, chunk // B), T)
    padding = -T % step
    x_BTD = jnp.pad(constrain(x_BTD, "batch", None, None), ((0, 0), (0, padding), (0, 0)))
    labels_BT = jnp.pad(labels_BT, ((0, 0), (0, padding)), constant_values=IGNORE)
    x_nNBCD = jnp.moveaxis(x_BTD.reshape(N, B // N, -1, step, D), 2, 0)
    labels_nNBC = jnp.moveaxis(labels_BT.reshape(N, B // N, -1, step), 2, 0)
    dw_NDV = constrain(jnp.zeros((N, *w_DV.shape), w_DV.dtype), "batch", None, "vocab")
    start = (jnp.zeros((), w_DV.dtype), dw_NDV if differentiate else None)
    (total, dw), dx_nNBCD = jax.lax.scan(one_chunk, start, (x_nNBCD, labels_nNBC))
    if dw is None or dx_nNBCD is None:
        return total, None, None
    dx_BTD = jnp.moveaxis(dx_nNBCD, 0, 2).reshape(B, -1, D)[:, :T]
    return total, constrain(dx_BTD, "batch", "sequence", None), constrain(dw.sum(0), *HEAD)


def _forward(
    x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int
) -> tuple[Array, tuple[Array | None, Array | None]]:
    total, dx_BTD, dw_DV = _chunked(x_BTD, w_DV, labels_BT, chunk, differentiate=True)
    return total, (dx_BTD, dw_DV)


def _backward(chunk: int, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array, None]:
    dx_BTD, dw_DV = residuals
    return (dx_BTD * grad).astype(dx_BTD.dtype), dw_DV * grad, None


cross_entropy.defvjp(_forward, _backward)

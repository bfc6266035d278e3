"""Cross entropy that never holds more logits than those of a chunk of tokens.

The gradients are made in the forward pass, so no logits are kept. Chunks cut the vocabulary, not
the tokens as in torch: a piece of the output head that is cut over `fsdp` is gathered when its turn
comes (twice: for the softmax's sum, and for the gradients), and its gradient, final at once, goes
back into its shards; neither is ever whole on a device.

Shapes: B batch, T time, D model width, V vocabulary, which is S shards (`tensor`) of n chunks of C
tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from mooshak_jax.distributed.sharding import constrain, gather, shards
from mooshak_jax.ops.matmul import einsum

IGNORE_INDEX = -100


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int) -> Array:
    """Sum of -log p(label) over the tokens, in nats; labels of `IGNORE` count nothing.

    `x_BTD` are hidden states in the compute dtype and `w_DV` the output head, whose dtype (at least
    float32) is that of the softmax and of the sum. As many logits are in memory at once as `chunk`
    tokens have over the vocabulary. The caller divides by the number of labels.
    """
    return _chunked(x_BTD, w_DV, labels_BT, chunk, differentiate=False)[0]


def _chunked(
    x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int, differentiate: bool
) -> tuple[Array, Array | None, Array | None]:
    D, V = w_DV.shape
    S = shards("vocab", V)
    n = _chunks(V // S, -(-labels_BT.size // chunk))
    w_nDSC = jnp.moveaxis(w_DV.reshape(D, S, n, -1), 2, 0)
    ids_nSC = jnp.arange(V).reshape(S, n, -1).swapaxes(0, 1)
    x_BTD = constrain(x_BTD, "batch", None, None)
    counts_BT = labels_BT != IGNORE_INDEX

    def logits(w_DSC: Array, ids_SC: Array) -> tuple[Array, Array, Array]:
        """The piece of the head, its logits, and where the labels are among them."""
        narrow_DSC = gather(w_DSC, x_BTD.dtype, ("embed", "vocab", None))
        logits_BTSC = einsum("BTD,DSC->BTSC", x_BTD, narrow_DSC)
        return narrow_DSC, logits_BTSC, labels_BT[..., None, None] == ids_SC

    def add(carry: tuple, piece: tuple[Array, Array]) -> tuple[tuple, None]:
        """Sums of exponentials relative to the largest logit so far (arXiv:1805.02867)."""
        largest_BTS, sum_BTS, own_BTS = carry
        _, logits_BTSC, is_label_BTSC = logits(*piece)
        new_BTS = jnp.maximum(largest_BTS, logits_BTSC.max(-1))
        sum_BTS *= jnp.exp(largest_BTS - new_BTS)
        sum_BTS += jnp.exp(logits_BTSC - new_BTS[..., None]).sum(-1)
        # A sum of one number and zeros: a vocabulary that is cut cannot be indexed into.
        own_BTS += jnp.where(is_label_BTSC, logits_BTSC, 0).sum(-1)
        return (new_BTS, sum_BTS, own_BTS), None

    zeros_BTS = jnp.zeros((*labels_BT.shape, S), w_DV.dtype)
    start = (zeros_BTS - jnp.inf, zeros_BTS, zeros_BTS)
    (largest_BTS, sum_BTS, own_BTS), _ = jax.lax.scan(add, start, (w_nDSC, ids_nSC))
    log_z_BT = jax.nn.logsumexp(largest_BTS + jnp.log(sum_BTS), axis=-1)
    # Row by row: XLA would add up all tokens in one chain, at four times the rounding error.
    losses_B = jnp.sum((log_z_BT - own_BTS.sum(-1)) * counts_BT, axis=1)
    total = jnp.sum(jax.lax.optimization_barrier(losses_B))
    if not differentiate:
        return total, None, None

    def grads(dx_SBTD: Array, piece: tuple[Array, Array]) -> tuple[Array, Array]:
        narrow_DSC, logits_BTSC, is_label_BTSC = logits(*piece)
        # d loss / d logits = softmax - one_hot(label).
        d_BTSC = jnp.exp(logits_BTSC - log_z_BT[..., None, None]) - is_label_BTSC
        d_BTSC = (d_BTSC * counts_BT[..., None, None]).astype(x_BTD.dtype)
        dw_DSC = constrain(einsum("BTD,BTSC->DSC", x_BTD, d_BTSC), "embed", "vocab", None)
        dx_SBTD += einsum("BTSC,DSC->SBTD", d_BTSC, narrow_DSC)
        return constrain(dx_SBTD, "vocab", "batch", None, None), dw_DSC

    start_SBTD = constrain(jnp.zeros((S, *x_BTD.shape), w_DV.dtype), "vocab", "batch", None, None)
    dx_SBTD, dw_nDSC = jax.lax.scan(grads, start_SBTD, (w_nDSC, ids_nSC))
    dx_BTD = constrain(dx_SBTD.sum(0), "batch", "sequence", None).astype(x_BTD.dtype)
    dw_DV = jnp.moveaxis(dw_nDSC, 0, 2).reshape(D, V)
    return total, dx_BTD, constrain(dw_DV, "embed", "vocab")


def _chunks(width: int, wanted: int) -> int:
    """The fewest chunks of equal size, at least those wanted."""
    return next(n for n in range(min(wanted, width), width + 1) if width % n == 0)


def _forward(
    x_BTD: Array, w_DV: Array, labels_BT: Array, chunk: int
) -> tuple[Array, tuple[Array | None, Array | None]]:
    total, dx_BTD, dw_DV = _chunked(x_BTD, w_DV, labels_BT, chunk, differentiate=True)
    return total, (dx_BTD, dw_DV)


def _backward(chunk: int, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array, None]:
    dx_BTD, dw_DV = residuals
    return (dx_BTD * grad).astype(dx_BTD.dtype), dw_DV * grad, None


cross_entropy.defvjp(_forward, _backward)
